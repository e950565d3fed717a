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
    """Without the settings that keep Hugging Face's libraries offline."""
    environment = {key: value for key, value in clean_environment().items() if not key.startswith("HF_")}
    command = [sys.executable, "-m", "tests.security.tiny_jobs", str(folder), *words]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The folder of all jobs. A process that asked another machine would have ended with its own code."""
    folder = tmp_path_factory.mktemp("jobs")
    result = run(folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert sorted(path.name for path in (folder / "jobs").iterdir()) == NAMES
    assert (folder / "jobs" / "ppo" / "out" / "final" / "model.safetensors").is_file()
    return folder


def test_asking_another_machine_is_noticed(tmp_path):
    """A hub id does."""
    result = run(tmp_path, "hub")
    assert result.returncode == ATTEMPT and "an attempt to reach" in result.stderr


def test_nothing_is_world_writable(jobs):
    """Commands ran with umask 0; a recipe sets its own."""
    paths = [os.path.join(top, name) for top, folders, files in os.walk(jobs / "jobs") for name in folders + files]
    assert len(paths) > 50
    assert [path for path in paths if os.lstat(path).st_mode & stat.S_IWOTH and not os.path.islink(path)] == []
    script = ["bash", "-c", "umask 0; source utils/launch.sh; umask"]
    assert subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip() == "0002"


def test_data_reach_neither_shell_nor_path(jobs):
    """What the records name would have been made, or would stand beside the folders."""
    assert not list(jobs.rglob("ran"))
    assert not [place for place in (REPOSITORY, *REPOSITORY.parents, *jobs.parents) if (place / "ran").exists()]
    assert {path.name for path in jobs.iterdir()} == {"jobs", "materials", "data", "dialogues.json", "pairs.json"}
    written = {path.name for name in NAMES if name != "made" for path in (jobs / "jobs" / name).iterdir()}
    assert written <= {"out", "scored.jsonl", "evaluation"}
