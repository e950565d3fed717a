"""References that move, and averaged policies: closed forms, exports, resume, two ranks."""

from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_run import assert_close, final_weights, read_metrics, run_flags
from tests.helpers.two_ranks import alone_and_on_two_ranks
from train_ppo import main
from utils.tokenizer import load_tokenizer

SETTINGS = {
    "ema": {"reference": "ema", "reference_decay": 0.5},
    "periodic": {"reference": "periodic", "reference_interval": 2},
    "policy_ema": {"policy_ema": 0.25},
}
FLAGS = {"train_steps": 4, "num_eval_prompts": 0, "checkpoint_per_step": 1, "keep_checkpoints": 9, "lr": 1e-3}


def weights_after(inputs, folder: Path, steps: int, **flags) -> dict[str, torch.Tensor]:
    """The policy after a number of steps, which with a constant learning rate are the first of a longer run."""
    out = folder / f"steps_{steps}"
    main(run_flags(inputs, out, **FLAGS | {"train_steps": steps, "lr_schedule": "constant"} | flags))
    return final_weights(out)


def test_the_average_is_the_closed_form(inputs, tmp_path):
    """With d = 1/4, after three steps: d³ w0 + (1 - d)(d² w1 + d w2 + w3)."""
    flags = SETTINGS["policy_ema"]
    start = final_weights(Path(inputs.policy).parent, Path(inputs.policy).name)
    steps = [start, *(weights_after(inputs, tmp_path, steps, **flags) for steps in (1, 2, 3))]
    average, last = final_weights(tmp_path / "steps_3", "final_ema"), steps[-1]
    assert average.keys() == last.keys()
    for name, x in average.items():
        expected = steps[0][name] / 64 + 0.75 * (steps[1][name] / 16 + steps[2][name] / 4 + steps[3][name])
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(x, last[name], atol=1e-4) for name, x in average.items())
    assert len(load_tokenizer(str(tmp_path / "steps_3" / "final_ema"))) > 0


def test_a_periodic_reference_is_the_policy_of_its_step(inputs, tmp_path):
    """KL and perplexities: after steps 2 and 4 the reference is the policy, so that steps 1, 3 and 5 have no KL."""
    main(run_flags(inputs, tmp_path / "run", **FLAGS | {"train_steps": 5}, **SETTINGS["periodic"]))
    kls = [row["kl_ref"] for row in read_metrics(tmp_path / "run")]
    assert [kl == 0 for kl in kls] == [True, False, True, False, True]


def test_an_averaged_reference_lies_between(inputs, tmp_path):
    """It follows the policy: the perplexity under the reference moves; a decay of 1 is the frozen reference."""
    runs = {"frozen": {}, "still": {"reference": "ema", "reference_decay": 1.0}, "half": SETTINGS["ema"]}
    rows = {}
    for name, flags in runs.items():
        main(run_flags(inputs, tmp_path / name, **FLAGS, **flags))
        rows[name] = read_metrics(tmp_path / name)
    assert rows["frozen"] == rows["still"]
    assert rows["half"][0] == rows["frozen"][0]
    assert rows["half"][1]["perplexity_ref"] != rows["frozen"][1]["perplexity_ref"]


@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SETTINGS)
def test_resume_restores_averages(inputs, tmp_path, name, offload):
    """Three steps, stopped after the first and resumed, are three steps."""
    flags = FLAGS | SETTINGS[name] | {"lr_schedule": "constant", "offload_frozen": offload}
    main(run_flags(inputs, tmp_path / "whole", **flags))
    main(run_flags(inputs, tmp_path / "parts", **flags | {"train_steps": 3}))
    main(run_flags(inputs, tmp_path / "parts", **flags, resume_with_changes=True))
    assert_close(tmp_path / "parts", tmp_path / "whole")
    exported = "final_ema" if name == "policy_ema" else "final"
    weights, expected = (final_weights(tmp_path / run, exported) for run in ("parts", "whole"))
    for key, x in weights.items():
        torch.testing.assert_close(x, expected[key])


def test_an_average_that_is_new_at_the_resume_starts_at_the_weights(inputs, tmp_path):
    """A checkpoint without it: the average begins with the restored policy."""
    flags = FLAGS | {"lr_schedule": "constant"}
    main(run_flags(inputs, tmp_path / "run", **flags | {"train_steps": 3}))
    before = final_weights(tmp_path / "run")
    main(run_flags(inputs, tmp_path / "run", **flags, policy_ema=0.25, resume_with_changes=True))
    last, average = (final_weights(tmp_path / "run", name) for name in ("final", "final_ema"))
    for key, x in average.items():
        torch.testing.assert_close(x, 0.25 * before[key] + 0.75 * last[key], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def two_ranks(inputs, tmp_path_factory) -> dict[str, Path]:
    """As of `alone_and_on_two_ranks`."""
    runs = {name: ("train_ppo", FLAGS | flags) for name, flags in SETTINGS.items()}
    return alone_and_on_two_ranks(inputs, tmp_path_factory.mktemp("references"), runs, stages=(0, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_equal_one_process(two_ranks, name, stage):
    one, two = two_ranks[f"{name} alone"], two_ranks[f"{name} {stage}"]
    assert_close(two, one, rel=1e-3, abs=1e-4)
    if name == "policy_ema":
        weights, expected = (final_weights(run, "final_ema") for run in (two, one))
        for key, x in weights.items():
            torch.testing.assert_close(x, expected[key], rtol=0, atol=1e-4)
