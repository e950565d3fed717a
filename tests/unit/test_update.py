"""The update: terms of the objective, metrics, which models a step changes, and what stops it in each ZeRO stage."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import ppo.update
from data.dialogues import EncodedDialogue
from ppo.types import Experience
from ppo.update import critic_backward, policy_backward, policy_objective, update
from tests.helpers.parts import (
    GradientEngine,
    ppo_config,
    rollout_by_hand,
    scored,
    tiny_models,
    tiny_policy,
    tiny_scalar_model,
)
from utils.engine.engine import TrainEngine
from utils.errors import UserError
from utils.sums import add, means

MASK = torch.tensor([[False, True, True, False]])
LOGPROBS = torch.tensor([[9.0, -1.0, -2.0, 9.0]])
ENTROPY = torch.tensor([[9.0, 1.0, 3.0, 9.0]])
PRETRAIN = [
    EncodedDialogue([1, 5, 6, 2], [False, False, True, True]),
    EncodedDialogue([1, 7, 2], [False, True, True]),
]


def objective(ratio: float = 1.0, **flags) -> tuple[float, dict[str, float]]:
    """Loss and metrics of two tokens with advantages 1 and 3, reference log-probs -2 and -4, and this ratio."""
    zeros, old = torch.zeros(1, 4), LOGPROBS - math.log(ratio)
    advantages, reference = torch.tensor([[9.0, 1.0, 3.0, 9.0]]), torch.tensor([[9.0, -2.0, -4.0, 9.0]])
    part = Experience(zeros.long(), MASK, MASK, old, reference, zeros, zeros, advantages, zeros)
    loss, sums = policy_objective(part, LOGPROBS, ENTROPY, ppo_config(**flags), 2.0)
    return float(loss), means(sums)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, -2.0),
        ({"ratio": 1.5}, -2.0 * 1.2),
        ({"ratio": 1.5, "use_policy_loss_clip": False}, -2.0 * 1.5),
        ({"kl_penalty_weight": 0.5}, -2.0),  # in the rewards already
        # k2: ½·1² and ½·2², mean 1.25; k3 of d = -1 and -2: e⁻¹ and e⁻² + 1
        ({"kl_in": "loss", "kl_estimator": "k2", "kl_penalty_weight": 0.5}, -2.0 + 0.5 * 1.25),
        (
            {"kl_in": "loss", "kl_estimator": "k3", "kl_penalty_weight": 0.5},
            -2.0 + 0.5 * (math.exp(-1) + math.exp(-2) + 1) / 2,
        ),
        ({"use_entropy_loss": True, "entropy_loss_weight": 0.1}, -2.0 - 0.1 * 2.0),
        ({"use_entropy_loss": True, "entropy_loss_weight": 0.1, "entropy_clip": 2.0}, -2.0 - 0.1 * 1.5),
    ],
)
def test_objective_by_hand(flags, expected):
    assert objective(**flags)[0] == pytest.approx(expected, rel=1e-5)


def test_metrics_of_the_objective_by_hand():
    # Both advantages are positive: a ratio that is too low is not clipped. KL(old, new) by k3: ρ - 1 - ln ρ.
    for ratio, clipped in ((1.5, 1.0), (0.5, 0.0)):
        surrogate, kl = -2.0 * min(ratio, 1.2), ratio - 1 - math.log(ratio)
        expected = {"policy_loss": surrogate, "approx_kl": kl, "clip_fraction": clipped, "ratio_mean": ratio}
        assert objective(ratio, kl_in="loss", kl_estimator="k2")[1] == pytest.approx(expected, rel=1e-5)


def weights(engine: GradientEngine | TrainEngine) -> torch.Tensor:
    if isinstance(engine, TrainEngine):
        return torch.cat([x.flatten() for x in engine.full_state_dict().values()])
    return nn.utils.parameters_to_vector(engine.module.parameters()).detach().clone()


def test_without_a_learning_rate_only_the_critic_moves():
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models)
    policy, critic = weights(models.policy), weights(models.critic)
    metrics = update(models.policy, models.critic, experience, config, 0, 0.0, 1e-2)
    assert torch.equal(weights(models.policy), policy) and not torch.equal(weights(models.critic), critic)
    assert metrics.keys() == {"value_loss", "grad_norm_critic"}


def test_without_a_critic_the_policy_learns_the_same():
    found = []
    for with_critic in (True, False):
        models = tiny_models()
        experience, config = scored(rollout_by_hand(), models, batch_size=2)
        critic = models.critic if with_critic else None
        found.append((update(models.policy, critic, experience, config, 0, 1e-3, 1e-3), weights(models.policy)))
    (both, moved), (alone, same) = found
    assert torch.equal(moved, same)
    assert both.keys() - alone.keys() == {"value_loss", "value_clip_fraction", "grad_norm_critic"}
    assert alone == {name: both[name] for name in alone}


def test_every_epoch_visits_every_sample_once_in_whole_batches(monkeypatch):
    models, steps = tiny_models(), []
    experience, config = scored(rollout_by_hand(), models, batch_size=2, ppo_epochs=3)
    monkeypatch.setattr(models.policy, "apply", steps.append)
    seen: list[int] = []
    models.critic.module.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[0][:, 1].tolist()))
    update(models.policy, models.critic, experience, config, 0, 1e-3, 1e-3)
    assert steps == [1e-3] * 6
    second_tokens = sorted(experience.sequences[:, 1].tolist())
    assert [sorted(seen[i : i + 4]) for i in (0, 4, 8)] == [second_tokens] * 3


def test_metrics_are_sums_over_tokens_divided_once():
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models, batch_size=4, use_critic_loss_clip=False)
    values = torch.where(experience.response_mask, experience.old_values, 0.0)
    metrics = update(models.policy, models.critic, experience, config, 0, 1e-3, 1e-3)
    squares = float(0.5 * (values - experience.returns).square().sum() / 12)
    assert metrics["value_loss"] == pytest.approx(squares, rel=1e-4)
    assert metrics["policy_loss"] == pytest.approx(float(-experience.advantages.sum() / 12), abs=1e-5)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    # Minibatches of 4, 3 and 5 tokens are not averaged as if they were equal.
    sums = {}
    for total, count in ((4.0, 4.0), (3.0, 3.0), (50.0, 5.0)):
        add(sums, {"x": (total, count), "nothing": (0.0, 0.0)})
    assert means(sums) == {"x": 57 / 12, "nothing": 0.0}


@pytest.mark.parametrize("flags", [{"use_critic_loss_clip": False}, {}])
def test_value_clipping_by_switch_and_weight_of_the_value_loss(flags):
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models, **flags)
    experience = replace(experience, old_values=experience.old_values - 5.0, returns=experience.returns - 5.0)
    critic_backward(models.critic, experience, config)
    once = models.critic.gradients()
    critic_backward(models.critic, experience, replace(config, vf_loss_weight=0.25))
    torch.testing.assert_close(models.critic.gradients(), 0.25 * once)
    assert once.abs().max() > 1e-3
    critic_backward(models.critic, experience, replace(config, value_clip=1e6))
    # Values moved away from the returns: the unclipped square is the larger, so clipping changes nothing here...
    torch.testing.assert_close(once, models.critic.gradients())
    # ... but values that ran past the window towards their returns get no gradient.
    experience = replace(experience, returns=experience.old_values + 50.0)
    critic_backward(models.critic, experience, config)
    assert bool(models.critic.gradients().any()) is bool(flags)


def test_pretraining_joins_the_same_step_with_its_weight():
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models, ppo_pretrain_loss_weight=0.5)
    loss_alone, _ = policy_backward(models.policy, experience, config, None)
    alone = models.policy.gradients()
    loss, sums = policy_backward(models.policy, experience, replace(config, micro_batch_tokens=4), PRETRAIN)
    together = models.policy.gradients()
    lm, nll = models.policy.module.lm, []
    for dialogue in PRETRAIN:
        logprobs = torch.log_softmax(lm(torch.tensor([dialogue.ids])).logits[0, :-1], -1)
        nll += [-logprobs[t - 1, dialogue.ids[t]] for t, learnt in enumerate(dialogue.answer_mask) if learnt]
    expected = torch.stack(nll).mean()
    (0.5 * expected).backward()
    torch.testing.assert_close(together - alone, models.policy.gradients(), atol=1e-6, rtol=1e-4)
    assert means(sums)["pretrain_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert float(loss - loss_alone) == pytest.approx(0.5 * expected.item(), rel=1e-4)  # what may stop the step


def test_trap_10_micro_batches_and_ranks_give_the_same_gradient(monkeypatch):
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models)
    for backward, engine, rest in ((policy_backward, models.policy, (None,)), (critic_backward, models.critic, ())):
        (whole_loss, whole_sums), whole = backward(engine, experience, config, *rest), engine.gradients()
        for ranks, micro_batch_tokens in ((1, 1), (1, 20), (2, 1000), (3, 13), (3, 1)):
            monkeypatch.setattr(ppo.update, "world_size", lambda ranks=ranks: ranks)
            loss, sums, cut = 0.0, {}, replace(config, micro_batch_tokens=micro_batch_tokens)
            for rank in range(ranks):
                monkeypatch.setattr(ppo.update, "rank", lambda rank=rank: rank)
                share, part = backward(engine, experience, cut, *rest)
                loss += share
                add(sums, part)
            torch.testing.assert_close(engine.gradients(), whole, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(loss, whole_loss, atol=1e-6, rtol=1e-4)
            assert all(count == 12 for _, count in sums.values())
            assert means(sums) == pytest.approx(means(whole_sums), rel=1e-4, abs=1e-5)
        monkeypatch.undo()
    assert whole.abs().max() > 1e-3


def test_trap_14_a_huge_value_loss_leaves_the_policys_step_alone(single_process):
    found = []
    for far in (0.0, 1e4):
        experience, config = scored(rollout_by_hand(), tiny_models(), gradient_clip=0.01)
        experience = replace(experience, returns=experience.returns + far)
        policy = TrainEngine(tiny_policy(), config, "policy")
        critic = TrainEngine(tiny_scalar_model(seed=2), config, "critic")
        start = weights(policy)
        metrics = update(policy, critic, experience, config, 0, 1e-3, 1e-3)
        found.append(weights(policy))
    assert metrics["grad_norm_critic"] > 1e3 * metrics["grad_norm_policy"] > 0
    assert torch.equal(*found) and not torch.equal(found[0], start)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_trap_14_both_step_or_neither_and_a_bad_batch_leaves_no_trace(single_process, zero_stage):
    """Loss of the policy, loss of the critic, and a gradient of either that explodes though the losses are finite."""
    experience, config = scored(rollout_by_hand(), tiny_models(), batch_size=4, zero_stage=zero_stage)
    limit = replace(config, explosion_limit=1e4)

    def engines() -> tuple[TrainEngine, TrainEngine]:
        critic = TrainEngine(tiny_scalar_model(seed=2), limit, "critic")
        return TrainEngine(tiny_policy(), limit, "policy"), critic

    def broken(name: str, value: float):
        column = getattr(experience, name).clone()
        column[experience.response_mask] = value
        return replace(experience, **{name: column})

    policy, critic = engines()
    told: list[str] = []
    bad = {"the loss of the policy is not finite": broken("advantages", math.nan)}
    bad["the loss of the critic is not finite"] = broken("returns", math.inf)
    bad["the loss of the critic is beyond --explosion_limit"] = broken("returns", 1e4)
    bad["the gradient of the policy is not finite, or beyond --explosion_limit"] = broken("advantages", 100.0)
    # The last: the policy's gradient, which is good, must not be there in the next step.
    bad["the gradient of the critic is not finite, or beyond --explosion_limit"] = broken("returns", 100.0)
    before = weights(policy), weights(critic)
    for text, batch in bad.items():
        if text.startswith("the gradient"):
            {"critic": critic, "policy": policy}[text.split()[4]].explosion_limit = 10.0
        update(policy, critic, batch, limit, 0, 1e-3, 1e-3, on_bad=lambda problem, _: told.append(problem))
        assert told[-1].startswith(text)
        policy.explosion_limit = critic.explosion_limit = 1e4
        assert torch.equal(weights(policy), before[0])
        assert torch.equal(weights(critic), before[1])
    assert len(told) == len(bad)
    with pytest.raises(UserError, match=r"policy is not finite .* no weights were changed"):
        update(policy, critic, next(iter(bad.values())), limit, 0, 1e-3, 1e-3)
    others = engines()
    for pair in ((policy, critic), others):
        update(*pair, experience, limit, 0, 1e-3, 1e-3)
    assert torch.equal(weights(policy), weights(others[0])) and not torch.equal(weights(policy), before[0])
    assert torch.equal(weights(critic), weights(others[1])) and not torch.equal(weights(critic), before[1])


def test_a_large_metric_that_is_no_loss_does_not_stop_the_step():
    """All ratios are e⁴⁰ and clipped: the loss is -1.2 A."""
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models, explosion_limit=1e3)
    far = torch.where(experience.response_mask, experience.old_logprobs - 40.0, 0.0)
    experience = replace(experience, old_logprobs=far, advantages=experience.response_mask.float())
    metrics = update(models.policy, models.critic, experience, config, 0, 1e-3, 1e-3)
    assert metrics["ratio_mean"] > 1e17 and metrics["approx_kl"] > 1e17
    assert metrics["policy_loss"] == pytest.approx(-1.2) and metrics["clip_fraction"] == 1.0


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_is_adamw_on_the_sum_of_the_micro_batches(single_process, zero_stage):
    config = ppo_config(zero_stage=zero_stage, gradient_clip=0.05)
    engine, plain = TrainEngine(tiny_scalar_model(), config, "critic"), tiny_scalar_model()
    betas = (config.adam_beta1, config.adam_beta2)
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=betas, eps=config.adam_eps, weight_decay=0.0)
    generator, start = torch.Generator().manual_seed(0), nn.utils.parameters_to_vector(plain.parameters()).detach()
    for _ in range(3):
        for length in (9, 4, 6):
            ids = torch.randint(24, (2, length), generator=generator)
            engine.backward(engine(ids, torch.ones_like(ids)).square().sum())
            plain(ids, torch.ones_like(ids)).square().sum().backward()
        norm = float(nn.utils.clip_grad_norm_(plain.parameters(), config.gradient_clip))
        assert norm > config.gradient_clip
        assert engine.measure() == pytest.approx(norm, rel=1e-5)
        engine.apply(1e-3)
        adam.step()
        adam.zero_grad()
    end = nn.utils.parameters_to_vector(plain.parameters()).detach()
    assert (weights(engine) - end).norm() < 1e-4 * (end - start).norm()
