"""PPO on rollouts of vLLM is, in float32, the run that it is on rollouts of the toolkit's own decoding."""

import pytest

from tests.faults.scenarios import finished, run_cases
from tests.helpers.tiny_run import read_metrics

# Steps large enough that the policy is another one after each.
FLAGS = {"ranks": 1, "train_steps": 20, "lr": 1e-3, "critic_lr": 3e-3, "batch_size": 8, "checkpoint_per_step": 100}


LORA = {"lora_rank": 4, "train_steps": 8, "lr": 1e-2}


@pytest.mark.slow
def test_adapters_are_merged_on_their_way_to_vllm(tmp_path, inputs):
    """And rollouts by the own engine, which applies them beside the frozen weights, are the same."""
    cases = {engine: FLAGS | LORA | {"rollout_engine": engine} for engine in ("own", "vllm")}
    runs = finished(run_cases(tmp_path, inputs, cases))
    own, vllm = (read_metrics(runs[name]) for name in ("own", "vllm"))
    assert len(own) == len(vllm) == 8
    assert own[-1]["kl_ref"] > 0.1
    for row, other in zip(own, vllm, strict=True):
        assert {key: other[key] for key in row} == pytest.approx(row, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_twenty_steps_are_those_of_own_decoding(tmp_path, inputs):
    """Same tokens from the same random numbers, hence the same scores, losses and gradients, step by step."""
    runs = finished(run_cases(tmp_path, inputs, {x: FLAGS | {"rollout_engine": x} for x in ("own", "vllm")}))
    own, vllm = (read_metrics(runs[name]) for name in ("own", "vllm"))
    assert len(own) == len(vllm) == 20
    assert own[-1]["kl_ref"] > 1.0  # nats per response: else both would sample from the policy they started with
    for row, other in zip(own, vllm, strict=True):
        assert {key: other[key] for key in row} == pytest.approx(row, rel=1e-4, abs=1e-5)
