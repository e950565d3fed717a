"""A lock file that a killed build left behind is removed; one of a build that is going on is not."""

import subprocess
import sys

import pytest

from utils.engine.build_lock import unblocked_builds

HOLDER = """
from utils.engine.build_lock import unblocked_builds
with unblocked_builds():
    print("holding", flush=True)
    input()
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The lock file of an op called `op`, in a build folder of the test's own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "op").mkdir()
    file = tmp_path / "op" / "lock"
    file.touch()
    return file


def test_an_orphaned_lock_is_removed_and_said(lock, capsys):
    with unblocked_builds():
        assert not lock.exists()
    assert str(lock) in capsys.readouterr().out


def test_the_lock_of_a_living_process_stays_until_that_is_killed(lock):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert "removed" in holder.stdout.readline()  # it was alone, and cleared the way
        assert holder.stdout.readline() == "holding\n"
        lock.touch()  # now it builds
        with unblocked_builds():
            assert lock.exists()
    finally:
        holder.kill()
        holder.wait()
    with unblocked_builds():
        assert not lock.exists()
