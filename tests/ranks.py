"""Commands on two ranks of this machine, as a user would start them: under DeepSpeed's launcher."""

import random
import socket
import subprocess
import sys
from pathlib import Path

from tests.tiny_run import REPOSITORY, clean_environment


def free_port() -> int:
    """A port that nobody listens at. Below those that the system gives to connections: it may take none in between.

    The launcher's own default would be one for all runs at once.
    """
    dice = random.SystemRandom()
    while True:
        port = dice.randrange(15_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def launch(flags: list[str]) -> subprocess.CompletedProcess:
    """Runs train_ppo.py with these flags on two ranks."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--no_local_rank"]
    return subprocess.run(
        [*launcher, "--master_port", str(free_port()), "train_ppo.py", *flags],
        cwd=REPOSITORY, env=clean_environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
        timeout=150,
    )  # fmt: skip
