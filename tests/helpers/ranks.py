"""Commands on two ranks of this machine, as a user would start them: under DeepSpeed's launcher."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.tiny_run import REPOSITORY, clean_environment
from utils.launcher import free_port


def launch(flags: list[str]) -> subprocess.CompletedProcess:
    """Runs train_ppo.py with these flags on two ranks."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--no_local_rank"]
    return subprocess.run(
        [*launcher, "--master_port", str(free_port()), "train_ppo.py", *flags],
        cwd=REPOSITORY, env=clean_environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
        timeout=150,
    )  # fmt: skip
