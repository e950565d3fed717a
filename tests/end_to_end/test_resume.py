"""A run that stopped and went on is the run that never stopped, bit for bit; what may not go on is refused by name."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_run import read_lines, read_metrics, run_flags
from train_ppo import main

# The critic alone first, then the policy with ptx and a function of the user's that draws random numbers.
FLAGS = {
    "critic_pretrain_steps": 1, "train_steps": 3, "checkpoint_per_step": 2, "num_rollouts": 8, "save_per_step": 2,
    "use_ppo_pretrain_loss": True, "ppo_pretrain_loss_weight": 0.5, "ppo_pretrain_batch_size": 4,
}  # fmt: skip
SETTINGS = [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"dtype": "bf16", "lr": 1e-3}]

DICE = """
import random
import numpy
import torch

def dice(prompts, answers):
    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in answers]
"""


@pytest.fixture(scope="module")
def dice(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("dice") / "dice.py"
    file.write_text(DICE)
    return f"{file}:dice"


@pytest.fixture(scope="module")
def finished(inputs, dice, tmp_path_factory):
    """(folder, flags) of an undisturbed run of four steps; each setting runs once."""
    known = {}

    def run(**settings) -> tuple[Path, dict]:
        if repr(settings) not in known:
            out = tmp_path_factory.mktemp("finished") / "run"
            flags = FLAGS | {"ppo_pretrain_data_path": inputs.dialogues, "reward_fn": dice} | settings
            main(run_flags(inputs, out, **flags))
            known[repr(settings)] = out, flags
        return known[repr(settings)]

    return run


def stopped_after(step: int, finished: Path, out: Path) -> Path:
    """A copy of a finished run as a kill after `step` (which has a checkpoint) would have left it, and worse."""
    shutil.copytree(finished, out)
    shutil.rmtree(out / "final")
    for path in (out / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "score_')  # cut off in the middle of a line
    (out / "checkpoints" / "step_3.partial").mkdir()
    return out


def assert_same_run(out: Path, expected: Path) -> None:
    """Metrics, texts and both exported models, bit for bit."""
    assert read_metrics(out) == read_metrics(expected)
    assert read_lines(out / "samples.jsonl") == read_lines(expected / "samples.jsonl")
    for name in ("final", "best"):
        weights, others = (load_file(run / name / "model.safetensors") for run in (out, expected))
        assert weights.keys() == others.keys()
        for key, tensor in weights.items():
            assert torch.equal(tensor, others[key]), key


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_resumed_run_is_the_same_run(finished, inputs, tmp_path, settings):
    expected, flags = finished(**settings)
    assert sorted(path.name for path in (expected / "checkpoints").iterdir()) == ["step_2", "step_4"]
    out = stopped_after(2, expected, tmp_path / "run")
    main(run_flags(inputs, out, **flags))
    assert_same_run(out, expected)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_2", "step_4"]
