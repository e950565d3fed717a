"""The places where PPO implementations break, one test each: traps 10 to 17, from the update to the best model."""

import math
from dataclasses import replace

import pytest
import torch

import ppo.score
import ppo.update
from data.batching.micro_batch_plan import rank_plan
from ppo.decoding.sampling import Sampling, uniforms
from ppo.evaluate import BestRule
from ppo.experience import make_experience, rollout_metrics
from ppo.loss import value_loss
from ppo.rollout import generate, response_ids
from ppo.score import even_batches
from ppo.update import critic_backward, policy_backward, shares, update
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
    tiny_scalar_model,
    token_ids,
)
from utils.engine.engine import InferenceEngine, TrainEngine
from utils.errors import UserError
from utils.moments import RunningMoments


def test_trap_10_micro_batches_and_ranks_give_the_same_gradient(monkeypatch):
    assert value_loss(*(torch.tensor([[x]]) for x in (5.0, 0.0, 4.0, True)), 1.0, 1.0).item() == 4.5  # around old 0
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models)
    engines = ((policy_backward, models.policy, (None,)), (critic_backward, models.critic, ()))
    for backward, engine, rest in engines:
        whole_sums, whole = backward(engine, experience, config, *rest)[0], engine.gradients()
        for ranks, micro_batch_tokens in ((1, 1), (1, 20), (2, 1000), (3, 13), (3, 1)):
            monkeypatch.setattr(ppo.update, "world_size", lambda ranks=ranks: ranks)
            sums: dict[str, float] = {}
            for rank in range(ranks):
                monkeypatch.setattr(ppo.update, "rank", lambda rank=rank: rank)
                part, _ = backward(engine, experience, replace(config, micro_batch_tokens=micro_batch_tokens), *rest)
                sums = {key: sums.get(key, 0.0) + value for key, value in part.items()}
            torch.testing.assert_close(engine.gradients(), whole, atol=1e-6, rtol=1e-4)
            tokens = next(key for key in sums if key.endswith("_tokens"))
            sums[tokens] /= ranks  # every rank reports the global count
            assert sums == pytest.approx(whole_sums, rel=1e-4, abs=1e-5)
        monkeypatch.undo()
    assert whole.abs().max() > 1e-3


def test_trap_11_truncated_responses_are_counted_and_may_cost():
    policy, config = InferenceEngine(tiny_policy()), ppo_config(missing_eos_penalty=2.0, use_reward_clip=False)
    rollout = generate(policy, prompts_of(*PROMPTS), Sampling(), 0, token_ids(eos=-1), config)
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


def test_trap_14_a_huge_value_loss_leaves_the_policys_step_alone(single_process):
    weights = []
    for far in (0.0, 1e4):
        experience, config = scored(rollout_by_hand(), tiny_models(), gradient_clip=0.01)
        experience = replace(experience, returns=experience.returns + far)
        policy = TrainEngine(tiny_policy(), config, "policy")
        critic = TrainEngine(tiny_scalar_model(seed=2), config, "critic")
        metrics = update(policy, critic, experience, config, 0, 1e-3, 1e-3)
        weights.append(torch.cat([p.detach().flatten() for p in policy.module.parameters()]))
    assert metrics["grad_norm_critic"] > 1e3 * metrics["grad_norm_policy"] > 0
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.cat([p.flatten() for p in tiny_policy().parameters()]))


def test_trap_15_random_streams_differ_and_never_restart():
    # Two ranks with two places each, three steps: every (place, position) draws a number of its own.
    places = [torch.arange(4 * step + 2 * rank, 4 * step + 2 * rank + 2) for step in range(3) for rank in range(2)]
    numbers = torch.cat([uniforms(42, own, position) for own in places for position in range(16)])
    assert len(numbers.unique()) == 3 * 4 * 16
    policy, config, same = InferenceEngine(tiny_policy()), ppo_config(maxlen_res=16), [[1, 7]] * 4
    later = prompts_of(*same, first_place=4)
    steps = [generate(policy, batch, Sampling(), 42, token_ids(eos=-1), config) for batch in (prompts_of(*same), later)]
    answers = [tuple(ids) for rollout in steps for ids in response_ids(rollout)]
    assert len(set(answers)) == 8
    alone = generate(policy, prompts_of([1, 7], first_place=6), Sampling(), 42, token_ids(eos=-1), config)
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
    rule = BestRule(max_kl=10.0)
    assert all(word in str(rule) for word in ("eval_score_mean", "eval_kl_ref", "10", "--best_max_kl"))
    assert rule.improves({"score_mean": 1.0, "kl_ref": 2.0})
    assert not rule.improves({"score_mean": 5.0, "kl_ref": 10.1})  # bought with too much KL
    assert not rule.improves({"score_mean": 1.0, "kl_ref": 1.0})
    assert rule.improves({"score_mean": 1.1, "kl_ref": 10.0})
