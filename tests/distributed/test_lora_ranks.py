"""Adapters on two ranks: the numbers of one process."""

import pytest

from reward.train import main as train_reward
from sft.train import main as train_sft
from tests.faults.scenarios import run_cases
from tests.helpers.tiny_run import assert_close, assert_same_run, fit_flags, write_json
from tests.helpers.two_ranks import alone_and_on_two_ranks

FLAGS = {"lora_rank": 4, "lr": 1e-2, "critic_pretrain_steps": 1, "export": "both"}


@pytest.mark.slow
def test_two_ranks_equal_one_process(inputs, tmp_path):
    stages = (0, 1, 2)
    runs = alone_and_on_two_ranks(inputs, tmp_path, {"lora": ("train_ppo", FLAGS)}, stages)
    for stage in stages:
        assert_close(runs[f"lora {stage}"], runs["lora alone"], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_adapters_are_read_by_two_ranks(inputs, tmp_path):
    """As policy and as reward model, which two ranks split; with adapters and with all weights trained."""
    adapter = tmp_path / "sft" / "final"
    train_sft(fit_flags(inputs.policy, inputs.dialogues, tmp_path / "sft", lora_rank=4, lr=1e-2, export="adapter"))
    pairs = write_json(tmp_path / "pairs.json", [{"prompt": "Why?", "chosen": "good", "rejected": "bad"}] * 12)
    train_reward(fit_flags(inputs.policy, pairs, tmp_path / "reward", lora_rank=4, lr=1e-2, export="adapter"))
    paths = {"policy_model_path": adapter, "reward_model_path": tmp_path / "reward" / "final", "train_steps": 2}
    jobs = {"whole": ("train_ppo", paths), "lora": ("train_ppo", FLAGS | paths)}
    runs = alone_and_on_two_ranks(inputs, tmp_path, {"whole": jobs["whole"]}, (2, 3))
    runs |= alone_and_on_two_ranks(inputs, tmp_path, {"lora": jobs["lora"]}, (2,))
    for name, stage in (("whole", 2), ("whole", 3), ("lora", 2)):
        assert_close(runs[f"{name} {stage}"], runs[f"{name} alone"], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(inputs, tmp_path):
    """Two ranks, ZeRO-2; rank 0 is killed in its update."""
    lora = {"lora_rank": 4, "lr": 1e-2, "train_steps": 4, "export": "both"}
    cases = {"undisturbed": lora, "killed": lora | {"fault": [0, "update", 11]}, "after": lora | {"out": "killed"}}
    results = run_cases(tmp_path, inputs, cases)
    assert -9 in results["killed"].codes, results["killed"].log[-3000:]
    assert results["after"].codes == [0, 0] and "resuming from" in results["after"].log, results["after"].log[-3000:]
    assert_same_run(results["after"].out, results["undisturbed"].out)
