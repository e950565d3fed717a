"""Launchers that kill ranks 30 seconds after a signal: the run has stopped before, in a step that has no end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.scenarios import SMALL, finished, run_cases
from tests.faults.test_terminals import WAITS, environment, until
from tests.helpers.tiny_run import REPOSITORY, assert_same_run, run_flags

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"],  # rank 1 gets the signal after rank 0's end
    "none": [],
}
SPLIT = {"zero_stage": 2}
TOGETHER = {"zero_stage": 3, "gather_for_generation": "never"}


def parent_of(process: str) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def flags_of(folder: Path, flags: dict) -> dict:
    """Flags of a run whose reward function waits, in its second call, for a file `go` in the folder."""
    (folder / "score.py").write_text(WAITS)
    return SMALL | flags | {"reward_fn": f"{folder}/score.py:score", "checkpoint_per_step": 50}


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "go").touch()
    cases = {"1 split": SPLIT | {"ranks": 1}, "2 split": SPLIT, "2 together": TOGETHER}
    return finished(run_cases(folder, inputs, {name: flags_of(folder, case) for name, case in cases.items()}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "flags"),
    [("torchrun", SPLIT), ("torchrun", TOGETHER), ("deepspeed", SPLIT), ("deepspeed", TOGETHER), ("none", SPLIT)],
)
def test_nothing_is_lost_but_the_buffer_at_hand(inputs, undisturbed, tmp_path, launcher, flags):
    words = run_flags(inputs, tmp_path / "run", **flags_of(tmp_path, flags))
    command = [sys.executable, *LAUNCHERS[launcher], "train_ppo.py", *words]
    log, ranks = tmp_path / "log", [tmp_path / f"rank{i}" for i in range(2 if LAUNCHERS[launcher] else 1)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=file, stderr=file)
    until(lambda: all(rank.exists() and rank.read_text() for rank in ranks))
    own = [rank.read_text() for rank in ranks]
    os.kill(parent_of(own[0]) if len(own) > 1 else process.pid, signal.SIGTERM)
    until(lambda: process.poll() is not None and not any(Path(f"/proc/{rank}").exists() for rank in own), 25)
    text = log.read_text()
    assert "stopped by SIGTERM after step 1; what followed is made again; the same command resumes" in text
    assert "checkpoint of step 1" in text and (tmp_path / "run" / "checkpoints" / "step_1" / "manifest.json").exists()
    (tmp_path / "go").touch()
    again = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "resuming from" in again.stdout, again.stdout + again.stderr
    assert_same_run(tmp_path / "run", undisturbed[f"{len(ranks)} {'together' if flags is TOGETHER else 'split'}"])
