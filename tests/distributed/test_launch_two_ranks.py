"""Two runs of two ranks at once, as the recipes start them: neither takes the other's port, exit codes arrive."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.tiny_run import REPOSITORY, clean_environment, read_metrics, run_flags

SCRIPT = 'set -euo pipefail; source utils/launch.sh; NUM_GPUS=2 launch "$@"'


def test_two_runs_on_one_machine(inputs, tmp_path):
    flags = {"all steps": {"train_steps": 1}, "out of time": {"max_hours": 1e-9, "checkpoint_per_step": 5}}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = clean_environment() | {"DS_ACCELERATOR": "cpu", "PATH": path}
    runs = {}
    for name, changes in flags.items():
        argv = run_flags(inputs, tmp_path / name, save_per_step=9, **changes)
        command = ["bash", "-c", SCRIPT, "bash", str(tmp_path / f"{name}.log"), "train_ppo.py", *argv]
        runs[name] = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    logs = {name: run.communicate(timeout=150)[0] for name, run in runs.items()}
    assert {name: run.returncode for name, run in runs.items()} == {"all steps": 0, "out of time": 75}, logs
    assert len(read_metrics(tmp_path / "all steps")) == len(read_metrics(tmp_path / "out of time")) == 1
    assert (tmp_path / "out of time" / "checkpoints" / "step_1").is_dir()
    assert (tmp_path / "all steps.log").read_text() == logs["all steps"]
