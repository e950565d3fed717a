"""Every command once, watched: no other machine is asked, nothing is world-writable, data stay data."""

import os
import stat
import subprocess
import sys

import pytest

from tests.helpers.tiny_run import REPOSITORY, clean_environment
from tests.security.tiny_jobs import ATTEMPT

NAMES = ["compare", "evaluate", "made", "ppo", "reward", "score", "sft", "strength"]


def run(folder, *words: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in clean_environment().items() if not key.startswith("HF_")}
    command = [sys.executable, "-m", "tests.security.tiny_jobs", str(folder), *words]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The folder of all jobs, run."""
    folder = tmp_path_factory.mktemp("jobs")
    result = run(folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return folder


def test_no_other_machine_is_asked(jobs):
    """Else the process ends with its own code (`run` of the fixture); it has come to its end."""
    assert sorted(path.name for path in (jobs / "jobs").iterdir()) == NAMES
    assert (jobs / "jobs" / "ppo" / "out" / "final" / "model.safetensors").is_file()


def test_an_attempt_is_noticed(tmp_path):
    """The hook itself: a hub id does ask another machine."""
    result = run(tmp_path, "hub")
    assert result.returncode == ATTEMPT
    assert "an attempt to reach" in result.stderr


def test_nothing_is_world_writable(jobs):
    """They ran with umask 0."""
    paths = [os.path.join(top, name) for top, folders, files in os.walk(jobs / "jobs") for name in folders + files]
    assert len(paths) > 50
    assert [path for path in paths if os.lstat(path).st_mode & stat.S_IWOTH and not os.path.islink(path)] == []


def test_data_reach_neither_shell_nor_path(jobs):
    """What the records name would have been made, or would stand beside the folders."""
    assert not list(jobs.rglob("ran"))
    above = (REPOSITORY, *REPOSITORY.parents, *jobs.parents)
    assert not [place for place in above if (place / "ran").exists()]
    named = {"jobs", "materials", "data", "dialogues.json", "pairs.json"}
    assert {path.name for path in jobs.iterdir()} == named
    allowed = {"out", "scored.jsonl", "evaluation"}
    assert {path.name for name in NAMES[:2] + NAMES[3:] for path in (jobs / "jobs" / name).iterdir()} <= allowed


def test_a_recipe_writes_nothing_that_is_world_writable():
    script = "umask 0; source utils/launch.sh; umask"
    result = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "0002"
