"""A run goes on with another number of ranks and another ZeRO stage; and two runs on one machine do not meet."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.faults.scenarios import finished, run_cases
from tests.helpers.tiny_run import REPOSITORY, clean_environment, final_weights, read_metrics, run_flags
from train_ppo import main

SCRIPT = 'set -euo pipefail; source utils/launch.sh; NUM_GPUS=2 launch "$@"'


def cut_back(run: Path, step: int) -> None:
    """As a kill after `step` would have left a run."""
    shutil.rmtree(run / "final")
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


def test_a_run_goes_on_with_another_number_of_ranks(inputs, tmp_path, capfd):
    """Step 1 on one process, step 2 on two, step 3 on one: the run of one process, but for roundings."""
    run = tmp_path / "run"
    flags = {"train_steps": 3, "checkpoint_per_step": 1, "keep_checkpoints": 4, "num_eval_prompts": 0}
    flags |= {"critic_pretrain_steps": 1}
    main(run_flags(inputs, run, zero_stage=0, **flags))
    expected, weights = read_metrics(run), final_weights(run)
    cut_back(run, 1)
    two = run_cases(tmp_path, inputs, {"two": flags | {"zero_stage": 3, "out": "run"}})
    finished(two)
    assert "resumed with another number of processes: 2, not 1" in two["two"].log
    assert "resumed with another --zero_stage: 3, not 0" in two["two"].log
    assert len(list((run / "checkpoints" / "step_2").glob("critic-rank*.safetensors"))) == 2
    cut_back(run, 2)
    main(run_flags(inputs, run, zero_stage=2, **flags))
    assert "resumed with another number of processes: 1, not 2" in capfd.readouterr().out
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0] == expected[0]
    for row, one in zip(rows[1:], expected[1:], strict=True):
        # Of clipped tokens there are few: one that another rounding carries over the limit is a hundredth of them.
        clipped = [name for name in one if name.endswith("clip_fraction")]
        assert [row.pop(name) for name in clipped] == pytest.approx([one.pop(name) for name in clipped], abs=0.05)
        assert row == pytest.approx(one, rel=1e-5, abs=5e-6)
    for name, tensor in final_weights(run).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-5)


FAILING = """
import os
steps = []
def score(prompts, answers):
    steps.append(1)
    if len(steps) == 2 and os.environ["RANK"] == "1":
        raise ValueError("no score today")
    return [0.0] * len(answers)
"""


def test_an_error_of_one_rank_in_training_ends_both(inputs, tmp_path):
    """Rank 0 waits for it in a collective."""
    (tmp_path / "score.py").write_text(FAILING)
    flags = {
        "reward_fn": f"{tmp_path}/score.py:score",
        "num_eval_prompts": 0,
        "checkpoint_per_step": 0,
        "zero_stage": 2,
    }
    result = run_cases(tmp_path, inputs, {"run": flags})["run"]
    assert result.codes == [2, 2], result.log
    assert "error [rank 0]: rank 1: " in result.log and result.log.count("no score today") == 2, result.log


@pytest.mark.slow
def test_two_runs_on_one_machine(inputs, tmp_path):
    """As the recipes start them: neither takes the other's port, exit codes arrive."""
    flags = {"all steps": {"train_steps": 1}, "out of time": {"max_hours": 1e-9, "checkpoint_per_step": 5}}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = clean_environment() | {"DS_ACCELERATOR": "cpu", "PATH": path}
    runs = {}
    for name, changes in flags.items():
        argv = run_flags(inputs, tmp_path / name, save_per_step=9, **changes)
        command = ["bash", "-c", SCRIPT, "bash", str(tmp_path / f"{name}.log"), "train_ppo.py", *argv]
        runs[name] = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    logs = {name: run.communicate(timeout=150)[0] for name, run in runs.items()}
    assert {name: run.returncode for name, run in runs.items()} == {"all steps": 0, "out of time": 75}, logs
    assert len(read_metrics(tmp_path / "all steps")) == len(read_metrics(tmp_path / "out of time")) == 1
    assert (tmp_path / "out of time" / "checkpoints" / "step_1").is_dir()
    assert (tmp_path / "all steps.log").read_text() == logs["all steps"]
