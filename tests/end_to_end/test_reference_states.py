"""Averages of the policy: rollback, two ranks that resume, float32 weights of a bf16 policy, no penalty."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.test_collapse import ALIKE, change_state
from tests.end_to_end.test_collapse import FLAGS as COLLAPSE
from tests.end_to_end.test_references import FLAGS, SETTINGS
from tests.faults.scenarios import finished, run_forked
from tests.helpers.tiny_run import assert_close, final_weights, read_metrics, run_flags
from train_ppo import main

pytestmark = pytest.mark.slow


def state_of(run: Path, step: int, engine: str) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of an engine or average, of one process."""
    return load_file(run / "checkpoints" / f"step_{step}" / f"{engine}-rank0.safetensors")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_rollback_restores_averages(inputs, tmp_path, name):
    """As a run that resumes at the checkpoint and passes over the buffer of the collapse."""
    (tmp_path / "flat.py").write_text(ALIKE)
    flags = COLLAPSE | SETTINGS[name] | {"lr": 1e-3}
    out, other, expected = tmp_path / "run", tmp_path / "other", tmp_path / "expected"
    main(run_flags(inputs, out, **flags, reward_fn=f"{tmp_path}/flat.py:third", on_collapse="rollback"))
    (tmp_path / "f.py").write_text(ALIKE.replace("buffers == 3", "False"))
    flags |= {"reward_fn": f"{tmp_path}/f.py:third"}
    main(run_flags(inputs, other, **flags))
    change_state(other / "checkpoints" / "step_2", next_place=3 * 8)
    main(run_flags(inputs, expected, **flags, resume=other / "checkpoints" / "step_2"))
    found = read_metrics(out)[2:]
    assert [row.pop("rollbacks") for row in found] == [1] * len(found)  # those of the flag's own runs only
    assert found == read_metrics(expected)
    exported = "final_ema" if name == "policy_ema" else "final"
    weights, others = final_weights(out, exported), final_weights(expected, exported)
    assert all(torch.equal(tensor, others[key]) for key, tensor in weights.items())


def test_the_average_of_a_bf16_policy_is_of_its_float32_weights(inputs, tmp_path):
    """Steps so small that most bf16 weights stay: the average after one step is w0 / 4 + 3 w1 / 4 nevertheless."""
    flags = FLAGS | {"train_steps": 1, "lr": 1e-6, "dtype": "bf16", "zero_stage": 2}
    main(run_flags(inputs, tmp_path / "run", **flags, **SETTINGS["policy_ema"]))
    after, average = (state_of(tmp_path / "run", 1, name) for name in ("policy", "policy_ema"))
    start = final_weights(inputs.policy.parent, inputs.policy.name)
    before = {f"weight/lm.{key}/0": x.bfloat16().float().flatten() for key, x in start.items()}
    assert average.keys() == before.keys()
    for key, x in average.items():
        torch.testing.assert_close(x, before[key] / 4 + 0.75 * after[key], rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(x, x.bfloat16().float()) for x in average.values())


def test_a_moving_reference_without_a_penalty(inputs, tmp_path):
    """--kl_penalty_weight 0: the reference does not change the policy, only the KL that is reported."""
    for name, flags in {"frozen": {}, "ema": SETTINGS["ema"]}.items():
        main(run_flags(inputs, tmp_path / name, **FLAGS, **flags, kl_penalty_weight=0))
    frozen, ema = (final_weights(tmp_path / name) for name in ("frozen", "ema"))
    assert all(torch.equal(x, ema[key]) for key, x in frozen.items())
    assert read_metrics(tmp_path / "frozen")[-1]["kl_ref"] != read_metrics(tmp_path / "ema")[-1]["kl_ref"]


@pytest.fixture(scope="module")
def resumed(inputs, tmp_path_factory) -> dict[str, Path]:
    """ "STAGE whole" and "STAGE parts": runs on two ranks with both averages, the second stopped and resumed."""
    folder, flags = tmp_path_factory.mktemp("resumed"), FLAGS | SETTINGS["ema"] | SETTINGS["policy_ema"]
    flags |= {"lr_schedule": "constant"}
    rows = {}
    for stage in (2, 3):
        cases = {"whole": {}, "stopped": {"train_steps": 3}, "parts": {"resume_with_changes": True}}
        for name, changes in cases.items():
            out = folder / f"{stage} {'whole' if name == 'whole' else 'parts'}"
            argv = run_flags(inputs, out, zero_stage=stage, **flags | changes)
            rows[f"{stage} {name}"] = {"module": "train_ppo", "argv": argv}
    return finished(run_forked(folder, rows))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_resume_with_their_averages(resumed, stage):
    whole, parts = resumed[f"{stage} whole"], resumed[f"{stage} parts"]
    assert_close(parts, whole)
    for name in ("final", "final_ema"):
        weights, expected = final_weights(parts, name), final_weights(whole, name)
        assert all(torch.equal(x, expected[key]) for key, x in weights.items())
