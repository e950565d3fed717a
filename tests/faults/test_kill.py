"""The short form of tests/faults/kill.py: a few kills of one process, and of two ranks."""

import subprocess
import sys

from tests.helpers.tiny_run import REPOSITORY, clean_environment


def test_runs_that_are_killed_end_as_if_they_had_not_been():
    """In a process of its own, which forks before it has any thread."""
    environment = clean_environment() | {"DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill", "--kills", "8"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.count(" | 1 | 1 | 1 | 1 | equal bit for bit | ") == 2
