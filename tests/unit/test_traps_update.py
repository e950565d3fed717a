"""The places where PPO implementations break, one test each: traps 11 to 17; 10 and 14 are in test_update.py."""

import math

import pytest
import torch

import ppo.score
import ppo.update
from data.batching.micro_batch_plan import rank_plan
from ppo.decoding.sampling import Sampling, uniforms
from ppo.evaluate import is_best
from ppo.experience import make_experience, rollout_metrics
from ppo.rollout import PolicySampler, response_ids
from ppo.score import even_batches
from ppo.update import shares
from tests.helpers.parts import (
    PROMPTS,
    ppo_config,
    prompts_of,
    rollout_by_hand,
    rollout_of,
    scored,
    scores_of,
    tiny_models,
    tiny_policy,
    token_ids,
)
from utils.engine.engine import InferenceEngine
from utils.errors import UserError
from utils.moments import RunningMoments


def test_trap_11_truncated_responses_are_counted_and_may_cost():
    policy, config = InferenceEngine(tiny_policy()), ppo_config(missing_eos_penalty=2.0, use_reward_clip=False)
    rollout = PolicySampler(policy, token_ids(eos=-1), config)(prompts_of(*PROMPTS), Sampling(), 0)
    assert rollout.response_mask.sum(1).tolist() == [config.maxlen_res] * 4
    scores = scores_of(rollout, [1.0, 1.0, 1.0, 1.0])
    assert rollout_metrics(rollout, scores)["eos_fraction"] == 0.0
    assert make_experience(rollout, scores, RunningMoments(), config).rewards.sum(1).tolist() == [-2.0] * 4


def test_trap_12_entropy_clip_above_ln_vocabulary_is_refused():
    flags = {"use_entropy_loss": True, "entropy_loss_weight": 0.01}
    with pytest.raises(UserError, match=r"--entropy_clip 35 .* ln\(32000\) = 10\.37"):
        ppo_config(**flags, entropy_clip=35.0).check_world(1, 32_000)
    ppo_config(**flags, entropy_clip=10.37).check_world(1, 32_000)


def test_trap_13_perplexity_is_exp_of_the_mean_nll_over_response_tokens():
    rollout = rollout_of([[0, 1, 0, 0], [0, 1, 1, 1]])
    logprobs = [[0.0, -4.0, 0.0, 0.0], [0.0, -1.0, -2.0, -3.0]]
    metrics = rollout_metrics(rollout, scores_of(rollout, [0.0, 0.0], logprobs))
    # Neither exp of a mean over rows, (4 + 2) / 2, nor anything divided by length once more.
    assert metrics["perplexity"] == pytest.approx(math.exp(10 / 4))


def test_trap_15_random_streams_differ_and_never_restart():
    # Two ranks with two places each, three steps: every (place, position) draws a number of its own.
    places = [torch.arange(4 * step + 2 * rank, 4 * step + 2 * rank + 2) for step in range(3) for rank in range(2)]
    numbers = torch.cat([uniforms(42, own, position) for own in places for position in range(16)])
    assert len(numbers.unique()) == 3 * 4 * 16
    policy, config, same = InferenceEngine(tiny_policy()), ppo_config(maxlen_res=16), [[1, 7]] * 4
    later = prompts_of(*same, first_place=4)
    sampler = PolicySampler(policy, token_ids(eos=-1), config)
    steps = [sampler(batch, Sampling(), 42) for batch in (prompts_of(*same), later)]
    answers = [tuple(ids) for rollout in steps for ids in response_ids(rollout)]
    assert len(set(answers)) == 8
    alone = sampler(prompts_of([1, 7], first_place=6), Sampling(), 42)
    assert tuple(response_ids(alone)[0]) == answers[6]  # neither batch nor rank moves a stream


def test_trap_16_every_rank_does_the_same_number_of_forwards(monkeypatch):
    plans = [rank_plan([40, 3, 3, 3, 3], 6, 3, rank) for rank in range(3)]
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(i for plan in plans for part, weight in plan if weight for i in part) == [0, 1, 2, 3, 4]
    rollout = rollout_by_hand()
    monkeypatch.setattr(ppo.score, "gather_objects", lambda item: [item, 9])  # another rank needs nine
    batches = even_batches(rollout.attention_mask.sum(1).tolist(), 1000)
    assert len(batches) == 9 and sorted(batches[0]) == [0, 1, 2, 3]
    assert all(len(part) == 1 for part in batches[1:])
    experience, _ = scored(rollout, tiny_models())
    monkeypatch.setattr(ppo.update, "world_size", lambda: 6)
    forwards, tokens = [], 0
    for rank in range(6):
        monkeypatch.setattr(ppo.update, "rank", lambda rank=rank: rank)
        parts = list(shares(experience, 1))
        forwards.append(len(parts))
        tokens += sum(int(part.response_mask.sum()) for part in parts)
    assert forwards == [1] * 6 and tokens == 12  # two ranks have nothing to learn from, and run all the same


def test_trap_17_best_is_chosen_on_held_out_prompts_by_a_rule_that_prints_itself():
    assert is_best({"score_mean": 1.0, "kl_ref": 10.0}, 0.9, 10.0)
    assert not is_best({"score_mean": 5.0, "kl_ref": 10.1}, 0.9, 10.0)  # bought with too much KL
    assert not is_best({"score_mean": 1.0, "kl_ref": 1.0}, 1.0, 10.0)
