"""Starts one process per GPU: python -m utils.launcher [--hostfile FILE] 4 train_ppo.py --lr 1e-6 (or: 4 -m sft.train)

Exits with the code of the first rank that fails. Forwards signals, then waits without a time limit, so that ranks can
finish a checkpoint. DeepSpeed's and PyTorch's launchers kill ranks 30 seconds after a signal.

The machines of a host file, which are in DeepSpeed's format, are reached by ssh. Each runs this module with `--node`,
which reads from standard input what to start, with the environment, and then numbers of signals.
"""

import contextlib
import json
import os
import random
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from utils.slurm import PORTS
from utils.watchdog import STOPS

PATIENCE = 30.0  # seconds after which the other ranks are killed once one has failed
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15")  # notices within 45 s that a machine is gone
# Variables that begin like this belong to a machine, session or job, and are not passed on to other machines.
OF_A_MACHINE = ("HOSTNAME", "TMPDIR", "SSH_", "XDG_", "DBUS_", "DISPLAY", "XAUTHORITY", "KRB5CCNAME")
OF_A_MACHINE += ("SLURM_", "PBS_", "LSB_", "PMI_", "PMIX_", "OMPI_")


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
    if argv[0] == "--node":
        with open(0, "rb", buffering=0, closefd=False) as head:  # unbuffered: the lines that follow stay in the pipe
            order = json.loads(head.readline())
        os.environ.update(order["environ"])
        return supervise(ranks(**order["ranks"]), has_head=True)
    port = os.environ.get("MASTER_PORT") or str(free_port())
    if argv[0] != "--hostfile":
        return supervise(ranks(int(argv[0]), argv[1:], "127.0.0.1", port, nodes=1, node=0))
    with open(argv[1]) as file:
        hosts = [line.split()[0] for line in file if line.strip() and not line.startswith("#")]
    first = os.environ.get("MASTER_ADDR") or hosts[0].rpartition("@")[2]
    if len(hosts) > 1 and (first in ("localhost", "::1") or first.startswith("127.")):
        problem = f"other machines cannot reach the first one as {first}; write its name"
        print(f"error: HOSTFILE={shlex.quote(argv[1])}: {problem}", file=sys.stderr)
        return 2
    environ = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_MACHINE)}
    order = {"count": int(argv[2]), "command": argv[3:], "address": first, "port": port, "nodes": len(hosts)}
    orders = [{"environ": environ, "ranks": order | {"node": i}} for i in range(len(hosts))]
    return supervise([lambda pair=pair: Node(*pair) for pair in zip(hosts, orders, strict=True)])


class Node(subprocess.Popen):
    """The launcher of another machine, in a session of its own, so that a terminal's Ctrl-C reaches it once."""

    def __init__(self, host: str, order: dict):
        remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.quote(sys.executable)} -m utils.launcher --node"
        super().__init__([*SSH, host, remote], stdin=subprocess.PIPE, start_new_session=True)
        self._write(json.dumps(order))

    def send_signal(self, number: int) -> None:
        """Has the machine's ranks sent this signal."""
        self._write(str(int(number)))

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self.stdin.write(f"{line}\n".encode())
            self.stdin.flush()


def ranks(count: int, command: list[str], address: str, port: str, nodes: int, node: int) -> list[Callable]:
    """Returns functions that start this machine's ranks."""
    shared = {"WORLD_SIZE": str(nodes * count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": address, "MASTER_PORT": port}

    def start(i: int) -> subprocess.Popen:
        own = {"RANK": str(node * count + i), "LOCAL_RANK": str(i)}
        environ = os.environ | shared | own
        return subprocess.Popen([sys.executable, *command], env=environ, stdin=subprocess.DEVNULL)

    return [lambda i=i: start(i) for i in range(count)]


def supervise(starts: list[Callable[[], subprocess.Popen]], has_head: bool = False) -> int:
    """Starts processes, forwards signals to them and waits for all. Returns the exit code of the first that failed.

    has_head: standard input has more signals to forward, one number per line.
    """
    processes: list[subprocess.Popen] = []

    def forward(number: int, frame=None) -> None:
        for process in processes:
            process.send_signal(number)  # does nothing if the process has ended

    for number in STOPS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP; so do ranks
            signal.signal(number, forward)
    for start in starts:
        processes.append(start())
    code, deadline, inputs = 0, float("inf"), [0] if has_head else []
    while any(process.poll() is None for process in processes):
        for number in _sent(inputs):
            forward(number)
        failed = next((process.returncode for process in processes if process.poll()), 0)
        if failed and not code:
            code, deadline = failed, time.monotonic() + PATIENCE
        if time.monotonic() > deadline:
            forward(signal.SIGKILL)
    code = code or next((process.returncode for process in processes if process.returncode), 0)
    return code if code >= 0 else 128 - code


def _sent(inputs: list[int]) -> list[int]:
    """Waits 0.1 s, or until the head has sent signals, and returns these; SIGUSR1, once, if the head has died."""
    if not select.select(inputs, [], [], 0.1)[0]:
        return []
    numbers = os.read(0, 4096).split()  # whole lines, because each is written at once
    if not numbers:
        inputs.clear()
    return [int(number) for number in numbers] or [signal.SIGUSR1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
