"""train_ppo.py on two ranks does what it does on one: same metrics, same policy, same samples."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.scenarios import finished, run_cases
from tests.helpers.tiny_run import (
    assert_close,
    final_weights,
    read_lines,
    read_metrics,
    run_flags,
    tiny_reward_model,
)
from train_ppo import main

START = time.time()

# 11 prompts in buffers of 8, 3 held out: nothing of that divides by the ranks. So few tokens a micro-batch that the
# ranks plan different numbers of them. All losses on, the critic alone in the first of three steps.
FLAGS = {
    "train_steps": 2, "critic_pretrain_steps": 1, "micro_batch_tokens": 60, "maxlen_res": 16, "use_entropy_loss": True,
    "entropy_loss_weight": 0.1, "entropy_clip": 5, "use_ppo_pretrain_loss": True, "ppo_pretrain_loss_weight": 0.5,
    "ppo_pretrain_batch_size": 5, "missing_eos_penalty": 0.5,
}  # fmt: skip
REWARDS = {"reward_ensemble": "mean_minus_std", "train_steps": 1, "micro_batch_tokens": 45, "maxlen_res": 16}
TOGETHER = {"zero_stage": 3, "gather_for_generation": "never", "offload_frozen": True}
BF16 = {"dtype": "bf16", "lr": 1e-3, "train_steps": 1}  # before a rounding can change what is sampled
SETTINGS = {
    "ZeRO-2": {"zero_stage": 2},
    "gathered": {"zero_stage": 3, "gather_for_generation": "always"},
    "together": TOGETHER,
    "together, measured": TOGETHER | {"reuse_sampler_logprobs": True},
    # Logits come in pieces, and ranks have different numbers of tokens: each piece more would wait for ever.
    "small chunks": {"zero_stage": 3, "gradient_checkpoint": True, "fault": "small chunks"},
    "small chunks, ZeRO-1": {
        "zero_stage": 1,
        "offload_frozen": True,
        "fault": "small chunks",
    },  # of the reference alone
    "bf16, ZeRO-2": {"zero_stage": 2} | BF16,
    "bf16, gathered": {"zero_stage": 3, "gather_for_generation": "always"} | BF16,
}


@pytest.fixture(scope="module")
def rewards(inputs, tmp_path_factory) -> dict:
    """Flags of an ensemble of two, of which one has a tokenizer of its own, and of two functions; one may fail."""
    other = tiny_reward_model(tmp_path_factory.mktemp("reward") / "other", vocab=370)
    functions = [f"{inputs.reward_file}:{name}" for name in ("in_parts", "short")]
    return REWARDS | {
        "reward_model_path": [inputs.reward, other], "reward_fn": functions, "reward_fn_weights": [0.5, 0.01],
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(inputs, rewards, tmp_path_factory) -> dict[str, Path]:
    """Folders of the runs by setting; "alone" and "rewards alone" are those of one process."""
    folder = tmp_path_factory.mktemp("runs")
    main(run_flags(inputs, folder / "alone", ppo_pretrain_data_path=inputs.dialogues, **FLAGS))
    main(run_flags(inputs, folder / "rewards alone", zero_stage=3, **rewards))
    own = {"num_eval_prompts": 3, "checkpoint_per_step": None, "keep_checkpoints": None}
    flags = own | FLAGS | {"ppo_pretrain_data_path": inputs.dialogues}
    cases = {name: flags | settings for name, settings in SETTINGS.items()}
    cases |= {f"rewards {stage}": own | rewards | {"zero_stage": stage} for stage in (2, 3)}
    return finished(run_cases(folder, inputs, cases)) | {x: folder / x for x in ("alone", "rewards alone")}


@pytest.mark.parametrize("setting", [name for name in SETTINGS if "bf16" not in name])
def test_two_ranks_equal_one_process(runs, inputs, setting):
    """Measured over three steps: metrics differ by at most 9e-7 (gradient norms of 10 included), weights by 1e-6."""
    out = runs[setting]
    assert json.loads((out / "config.json").read_text())["world_size"] == 2
    assert_close(out, runs["alone"])
    first, expected = read_metrics(out)[0], read_metrics(runs["alone"])[0]
    assert first == pytest.approx(expected, rel=1e-6, abs=1e-6)  # only the critic has moved
    before, after, one = (
        load_file(inputs.policy / "model.safetensors"),
        final_weights(out),
        final_weights(runs["alone"]),
    )
    assert after.keys() == one.keys() == before.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, one[name], rtol=0, atol=1e-5)
    assert max((one[name] - before[name]).abs().max() for name in one) > 1e-4  # what those 1e-5 are to be held against
    for sample, one in zip(read_lines(out / "samples.jsonl"), read_lines(runs["alone"] / "samples.jsonl"), strict=True):
        numbers = {name for name, value in one.items() if isinstance(value, float)}
        assert all(sample[name] == pytest.approx(one[name], rel=1e-5, abs=5e-6) for name in numbers)
        assert all(sample[name] == one[name] for name in one.keys() - numbers)


def test_shared_memory_does_not_outlive_the_runs(runs):
    assert not [file.name for file in Path("/dev/shm").glob("deepspeed*") if file.stat().st_mtime >= START]


@pytest.mark.parametrize("stage", [2, 3])
def test_several_reward_models_score_as_on_one_process(runs, stage):
    """Ranks plan different numbers of micro-batches, and other ones for the other tokenizer. Some answers fail."""
    row = read_metrics(runs["rewards alone"])[0]
    assert row["eval_score_disagreement"] > 0 and 0 < row["reward_failed_fraction"] < 1
    assert row["reward_in_parts"] == pytest.approx(row["reward_in_parts_vowels"] + 1) and row["reward_short"] < 0
    assert_close(runs[f"rewards {stage}"], runs["rewards alone"])


def assert_equal_in_bf16(inputs, run: Path, expected: Path) -> None:
    """They went the same way. One that Adam moves by the sign of a gradient near 0 may have gone the other way."""
    weights, start = final_weights(run), load_file(inputs.policy / "model.safetensors")
    assert weights.keys() == start.keys() and {x.dtype for x in weights.values()} == {torch.bfloat16}
    parts = ([x[name].float().flatten() for name in start] for x in (weights, final_weights(expected), start))
    whole, wanted, before = map(torch.cat, parts)
    assert (whole - wanted).norm() < 0.05 * (wanted - before).norm()


def test_stages_export_the_same_policy_in_bf16(inputs, runs, tmp_path):
    assert_equal_in_bf16(inputs, runs["bf16, gathered"], runs["bf16, ZeRO-2"])
    for name, stage in (("expected", 2), ("run", 1)):
        main(run_flags(inputs, tmp_path / name, zero_stage=stage, **BF16))
    assert_equal_in_bf16(inputs, tmp_path / "run", tmp_path / "expected")
