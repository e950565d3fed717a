"""A run that stopped and went on is the run that never stopped, bit for bit; what may not go on is refused by name."""

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import rehash
from tests.helpers.tiny import SAMPLES, tiny_llama_folder
from tests.helpers.tiny_run import SIZES, assert_same_run, fit_flags, read_metrics, refusal, run_flags
from train_ppo import main
from utils.run.index import INDEX

# The critic alone first, then the policy with ptx and a function of the user's that draws random numbers.
FLAGS = {
    "critic_pretrain_steps": 1, "train_steps": 3, "checkpoint_per_step": 2, "num_rollouts": 8, "save_per_step": 2,
    "use_ppo_pretrain_loss": True, "ppo_pretrain_loss_weight": 0.5, "ppo_pretrain_batch_size": 4,
}  # fmt: skip
DICE = """
import random
import numpy
import torch

def dice(prompts, answers):
    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in answers]
"""


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """(folder, flags) of an undisturbed run of four steps; each setting runs once."""
    known, dice = {}, tmp_path_factory.mktemp("dice") / "dice.py"
    dice.write_text(DICE)

    def run(**settings) -> tuple[Path, dict]:
        if repr(settings) not in known:
            out = tmp_path_factory.mktemp("finished") / "run"
            flags = FLAGS | {"ppo_pretrain_data_path": inputs.dialogues, "reward_fn": f"{dice}:dice"} | settings
            main(run_flags(inputs, out, **flags))
            known[repr(settings)] = out, flags
        return known[repr(settings)]

    return run


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def stopped_after(step: int, finished: Path, out: Path) -> Path:
    """A copy of a finished run as a kill after `step` (which has a checkpoint) would have left it, and worse."""
    shutil.copytree(finished, out)
    shutil.rmtree(out / "final")
    for name in checkpoints(out):
        if int(name.removeprefix("step_")) > step:
            shutil.rmtree(out / "checkpoints" / name)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "score_')  # cut off in the middle of a line
    index = json.loads((out / INDEX).read_text())
    (out / INDEX).write_text(json.dumps(index | {"checkpoints": sorted({*index["checkpoints"], 3})}))
    (out / "checkpoints" / "step_3.partial").mkdir()
    return out


@pytest.mark.parametrize(
    "settings", [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}, {"dtype": "bf16", "lr": 1e-3}], ids=str
)
def test_a_resumed_run_is_the_same_run(finished, inputs, tmp_path, settings):
    expected, flags = finished(**settings)
    out = stopped_after(2, expected, tmp_path / "run")
    main(run_flags(inputs, out, **flags))
    assert_same_run(out, expected, "best")
    assert checkpoints(out) == checkpoints(expected) == ["step_2", "step_4"]


def test_a_damaged_checkpoint_is_passed_over(finished, inputs, tmp_path, capfd):
    expected, flags = finished(zero_stage=0, checkpoint_per_step=1, keep_checkpoints=3)
    out = stopped_after(3, expected, tmp_path / "run")
    (out / "checkpoints" / "step_3" / "state.json").write_text("{}")
    main(run_flags(inputs, out, **flags))
    said = capfd.readouterr().out
    assert re.search(r"warning: .*step_3 is damaged \(.*state.json.*\); trying an older one", said)
    assert re.search("resuming from .*/step_2", said)
    assert_same_run(out, expected, "best")


def test_what_may_not_go_on_is_refused_by_name(finished, inputs, tmp_path, capfd):
    expected, flags = finished(zero_stage=0)
    assert "already holds a run" in refusal(main, run_flags(inputs, expected, **flags), capfd)  # it is finished
    out = stopped_after(2, expected, tmp_path / "run")
    before = (out / "metrics.jsonl").read_bytes()
    for name, value in {"seed": 8, "lr": 1e-5, "policy_model_path": inputs.other_policy}.items():
        error = refusal(main, run_flags(inputs, out, **flags | {name: value}), capfd)
        assert re.search(f"--{name} .*differs from .*step_2 .*--resume_with_changes.*--overwrite", error)
    assert "already holds a run" in refusal(main, run_flags(inputs, out, **flags, resume="never"), capfd)
    error = refusal(main, run_flags(inputs, tmp_path / "new", **flags, resume="/nowhere"), capfd)
    assert "--resume" in error and "/nowhere" in error
    # A model of another size is refused also where changes are allowed: there is nothing to go on from.
    wide = tiny_llama_folder(tmp_path / "wide", **SIZES | {"intermediate_size": 96})
    argv = run_flags(inputs, out, **flags, policy_model_path=wide, resume_with_changes=True)
    assert re.search(r"step_2 does not fit the policy .*mlp\S+ has 3072 elements, not 2048", refusal(main, argv, capfd))
    assert (out / "metrics.jsonl").read_bytes() == before
    assert (out / "checkpoints" / "step_2" / "manifest.json").exists()


def test_a_run_goes_on_with_changes_that_are_asked_for(finished, inputs, tmp_path, capfd):
    expected, flags = finished(zero_stage=0)
    out = stopped_after(2, expected, tmp_path / "run")
    main(run_flags(inputs, out, **flags | {"lr": 1e-5, "rollout_batch_size": 8}, resume_with_changes=True))
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3, 4]
    assert "the finished run's" not in capfd.readouterr().out
    main(run_flags(inputs, out, **flags | {"train_steps": 4, "lr": 1e-5}, resume_with_changes=True))
    assert f"warning: {out}/final is removed" in capfd.readouterr().out
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3, 4, 5]


def stopped_by_the_clock(run: Callable, argv: list[str]) -> None:
    """One more step, then the exit code of --max_hours."""
    with pytest.raises(SystemExit) as stopped:
        run([*argv, "--max_hours", "1e-9"])
    assert stopped.value.code == 75


def test_a_named_checkpoint(finished, inputs, tmp_path, capsys):
    """In another folder it begins a new run. A finished run is taken back to it: what it wrote later goes."""
    expected, flags = finished(zero_stage=0)
    main(run_flags(inputs, tmp_path / "new", **flags, resume=expected / "checkpoints" / "step_2"))
    assert read_metrics(tmp_path / "new") == read_metrics(expected)[2:]
    out = shutil.copytree(expected, tmp_path / "run")
    stopped_by_the_clock(main, run_flags(inputs, out, **flags, resume=out / "checkpoints" / "step_2"))
    assert checkpoints(out) == ["step_2", "step_3"]
    assert read_metrics(out) == read_metrics(expected)[:3]
    assert not (out / "final").exists()
    assert "after step 3; the same command with --resume auto resumes from its checkpoint" in capsys.readouterr().out
    main(run_flags(inputs, out, **flags))
    assert_same_run(out, expected, "best")


def assert_not_changed_by_a_refusal(run: Callable, argv: list[str], out: Path, capfd) -> None:
    """NaN in the weights of the only checkpoint is found before the run's folder is prepared."""
    folder = out / "checkpoints" / "step_1"
    kept = shutil.copytree(folder, out.with_name("kept"))
    weights = load_file(folder / "model-rank0.safetensors")
    name = next(name for name in weights if name.startswith("weight/"))
    save_file(weights | {name: weights[name] * float("nan")}, folder / "model-rank0.safetensors")
    rehash(folder)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert re.search(r"step_1 is damaged \(model: .* not finite", refusal(run, argv, capfd))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.rmtree(folder)
    kept.rename(folder)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_supervised_stages_resume_too(stage, tmp_path, capfd):
    base, run = tiny_llama_folder(tmp_path / "base", **SIZES), importlib.import_module(f"{stage}.train").main
    data = SAMPLES / "en" / {"sft": "dialogues", "reward": "preferences"}[stage]
    flags = {"save_per_step": 2, "checkpoint_per_step": 1, "keep_checkpoints": 3}
    if stage == "reward":  # all that has a state of its own
        flags |= {"simcse_coef": 0.5, "center_scores": True, "validation_metric": "loss"}
    expected = tmp_path / "expected"
    run(fit_flags(base, data, expected, **flags))
    for step in (1, 3):
        out = stopped_after(step, expected, tmp_path / f"run{step}")
        argv = fit_flags(base, data, out, **flags)
        if step == 1:
            assert_not_changed_by_a_refusal(run, argv, out, capfd)
            stopped_by_the_clock(run, argv)
            assert [row["step"] for row in read_metrics(out)] == [1, 2]
        run(argv)
        assert_same_run(out, expected)
        assert (out / "final" / "config.json").read_text() == (expected / "final" / "config.json").read_text()
