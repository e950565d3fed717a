"""One of two ranks dies or stands still: the other does not wait for ever, and says where it waited."""

import re
import subprocess
import sys

import pytest

from tests.tiny_run import REPOSITORY, clean_environment, run_flags

TIMEOUT = 10  # seconds; several times what a step of this size takes
CODE = """
import pathlib, signal, sys
from tests.faults.kill import start, wait
log, phase, number, patience, *argv = sys.argv[1:]
print(wait(start(argv, 2, pathlib.Path(log), (1, phase, 2, getattr(signal, number))), float(patience)))
"""


def run(inputs, tmp_path, phase: str, number: str, patience: int) -> tuple[str, str]:
    """(exit codes of both ranks, what both wrote). patience: seconds until the second rank to end is killed."""
    log = tmp_path / "log"
    flags = run_flags(inputs, tmp_path / "run", train_steps=4, checkpoint_per_step=1, hang_timeout=TIMEOUT)
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(log), phase, number, str(patience), *flags],
        cwd=REPOSITORY, env=clean_environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
        timeout=150,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()[-1], log.read_text()


@pytest.mark.parametrize("phase", ["rollout", "saving"])
def test_a_rank_that_stands_still_ends_the_other_with_its_stacks(inputs, tmp_path, phase):
    codes, log = run(inputs, tmp_path, phase, "SIGSTOP", patience=1)
    assert codes == "[124, -9]"  # the second is the launcher's doing
    assert re.search(rf"error \[rank 0\]: nothing got done for {TIMEOUT} s \(--hang_timeout\) after '", log)
    assert re.search(r"most recent call first\):\n(.*\n)+.*train_ppo.py", log)


def test_a_rank_that_dies_ends_the_other(inputs, tmp_path):
    codes, _ = run(inputs, tmp_path, "update", "SIGKILL", patience=60)
    assert re.fullmatch(r"\[(1|124|-6), -9\]", codes)
