"""Starts one process per GPU of this machine: python -m utils.launcher 4 train_ppo.py --lr 1e-6 (or: 4 -m sft.train)

Exits with the code of the first rank that fails. Forwards signals, then waits without a time limit, so that ranks can
finish a checkpoint. DeepSpeed's and PyTorch's launchers kill ranks 30 seconds after a signal.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time

from utils.slurm import PORTS
from utils.watchdog import STOPS

PATIENCE = 30.0  # seconds after which the other ranks are killed once one has failed


def free_port() -> int:
    """Returns a free TCP port, so that several runs share a machine."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


def main(argv: list[str]) -> int:
    """Runs `argv`: number of processes, then python's arguments. Returns the exit code, 128 + n after signal n."""
    count, command = int(argv[0]), [sys.executable, *argv[1:]]
    shared = {"WORLD_SIZE": argv[0], "LOCAL_WORLD_SIZE": argv[0], "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(free_port())
    ranks: list[subprocess.Popen] = []

    def forward(number: int, frame) -> None:
        for process in ranks:
            process.send_signal(number)  # does nothing if the process has ended

    for number in STOPS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP; so do ranks
            signal.signal(number, forward)
    for i in range(count):
        ranks.append(subprocess.Popen(command, env=os.environ | shared | {"RANK": str(i), "LOCAL_RANK": str(i)}))
    code, deadline = 0, float("inf")
    while any(process.poll() is None for process in ranks):
        time.sleep(0.1)
        failed = next((process.returncode for process in ranks if process.poll()), 0)
        if failed and not code:
            code, deadline = failed, time.monotonic() + PATIENCE
        if time.monotonic() > deadline:
            forward(signal.SIGKILL, None)
    code = code or next((process.returncode for process in ranks if process.returncode), 0)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
