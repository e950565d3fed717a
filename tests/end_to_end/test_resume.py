"""A run that stopped and went on is the run that never stopped, bit for bit; what may not go on is refused by name."""

import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny import SAMPLES, tiny_llama_folder
from tests.helpers.tiny_run import SIZES, read_lines, read_metrics, run_flags
from tests.unit.test_checkpoint import DAMAGE
from train_ppo import main

# The critic alone first, then the policy with ptx and a function of the user's that draws random numbers.
FLAGS = {
    "critic_pretrain_steps": 1, "train_steps": 3, "checkpoint_per_step": 2, "num_rollouts": 8, "save_per_step": 2,
    "use_ppo_pretrain_loss": True, "ppo_pretrain_loss_weight": 0.5, "ppo_pretrain_batch_size": 4,
}  # fmt: skip
SETTINGS = [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}, {"dtype": "bf16", "lr": 1e-3}]

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


@pytest.mark.parametrize("reason", sorted(DAMAGE)[:1])
def test_a_damaged_checkpoint_is_passed_over(finished, inputs, tmp_path, capfd, reason):
    expected, flags = finished(zero_stage=0, checkpoint_per_step=1, keep_checkpoints=3)
    out = stopped_after(3, expected, tmp_path / "run")
    DAMAGE[reason](out / "checkpoints" / "step_3")
    main(run_flags(inputs, out, **flags))
    said = capfd.readouterr().out
    assert re.search(rf"warning: .*step_3 is damaged \({reason}\); trying an older one", said)
    assert re.search("resuming from .*/step_2", said)
    assert_same_run(out, expected)


def refusal(argv: list[str], capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))


def test_what_may_not_go_on_is_refused_by_name(finished, inputs, tmp_path, capsys):
    expected, flags = finished(zero_stage=0)
    assert re.search("already holds a run", refusal(run_flags(inputs, expected, **flags), capsys))  # it is finished
    out = stopped_after(2, expected, tmp_path / "run")
    before = (out / "metrics.jsonl").read_bytes()
    changes = {"seed": 8, "lr": 1e-5, "batch_size": 8, "policy_model_path": inputs.other_policy}
    for name, value in changes.items():
        error = refusal(run_flags(inputs, out, **flags | {name: value}), capsys)
        assert re.search(f"--{name} .* differs from .*step_2 .*--resume_with_changes.*--overwrite", error)
    assert re.search("already holds a run", refusal(run_flags(inputs, out, **flags, resume="never"), capsys))
    assert re.search(
        "--resume .*/nowhere is not an intact checkpoint .not a folder.",
        refusal(run_flags(inputs, tmp_path / "new", **flags, resume="/nowhere"), capsys),
    )
    assert (out / "metrics.jsonl").read_bytes() == before
    main(run_flags(inputs, out, **flags | {"lr": 1e-5, "rollout_batch_size": 8}, resume_with_changes=True))
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3, 4]
    assert "/final is removed" not in capsys.readouterr().out
    longer = flags | {"train_steps": 4, "lr": 1e-5}
    main(run_flags(inputs, out, **longer, resume_with_changes=True))
    assert f"warning: {out}/final is removed; steps after 4 run again" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3, 4, 5]


def test_a_checkpoint_of_a_model_of_another_size_is_refused(finished, inputs, tmp_path, capsys):
    """Also where changes are allowed: there is nothing to go on from."""
    expected, flags = finished(zero_stage=0)
    out = stopped_after(2, expected, tmp_path / "run")
    wide = tiny_llama_folder(tmp_path / "wide", **SIZES | {"intermediate_size": 96})
    argv = run_flags(inputs, out, **flags, policy_model_path=wide, resume_with_changes=True)
    error = refusal(argv, capsys)
    assert re.search(r"step_2 does not fit the policy of these flags: \S+mlp\S+ has 3072 elements, not 2048", error)
    assert (out / "checkpoints" / "step_2" / "manifest.json").exists()


def test_a_checkpoint_elsewhere_begins_a_new_folder(finished, inputs, tmp_path):
    expected, flags = finished(zero_stage=0)
    out = tmp_path / "run"
    main(run_flags(inputs, out, **flags, resume=expected / "checkpoints" / "step_2"))
    assert read_metrics(out) == read_metrics(expected)[2:]


def stopped_by_the_clock(run: Callable, argv: list[str]) -> None:
    """One more step, then the exit code of --max_hours."""
    with pytest.raises(SystemExit) as stopped:
        run([*argv, "--max_hours", "1e-9"])
    assert stopped.value.code == 75


def test_what_a_run_wrote_after_the_named_checkpoint_goes(finished, inputs, tmp_path, capsys):
    """A finished run is taken back to its step 2, is stopped after one step, and goes on by itself."""
    expected, flags = finished(zero_stage=0)
    out = shutil.copytree(expected, tmp_path / "run")
    stopped_by_the_clock(main, run_flags(inputs, out, **flags, resume=out / "checkpoints" / "step_2"))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_2", "step_3"]
    assert read_metrics(out) == read_metrics(expected)[:3]
    assert not (out / "final").exists()
    assert "after step 3; the same command with --resume auto resumes from its checkpoint" in capsys.readouterr().out
    main(run_flags(inputs, out, **flags))
    assert_same_run(out, expected)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_supervised_stages_resume_too(stage, tmp_path):
    data = {"sft": "dialogues", "reward": "preferences"}[stage]
    flags = {
        "hf_model_name_or_path": tiny_llama_folder(tmp_path / "base", **SIZES), "data_path": SAMPLES / "en" / data,
        "train_steps": 3, "warmup_steps": 1, "batch_size": 4, "context_truncate": 128, "lr": 1e-3, "save_per_step": 2,
        "dtype": "fp32", "checkpoint_per_step": 1, "keep_checkpoints": 3,
    }  # fmt: skip
    if stage == "reward":  # all that has a state of its own
        flags |= {"simcse_coef": 0.5, "center_scores": True, "validation_metric": "loss"}
    run = importlib.import_module(f"{stage}.train").main

    def argv(out: Path) -> list[str]:
        values = flags | {"model_save_path": out}
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    expected = tmp_path / "expected"
    run(argv(expected))
    for step in (1, 3):
        out = stopped_after(step, expected, tmp_path / f"run{step}")
        if step == 1:
            stopped_by_the_clock(run, argv(out))
            assert [row["step"] for row in read_metrics(out)] == [1, 2]
        run(argv(out))
        assert read_metrics(out) == read_metrics(expected)
        weights, others = (load_file(folder / "final" / "model.safetensors") for folder in (out, expected))
        assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
        assert (out / "final" / "config.json").read_text() == (expected / "final" / "config.json").read_text()
