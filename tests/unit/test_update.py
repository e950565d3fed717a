"""The update: terms of the objective by hand, metrics, what a step changes, and the same gradient however cut."""

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


@pytest.mark.parametrize("flags", [{"use_critic_loss_clip": False}, {}])
def test_value_clipping_by_switch_and_weight_of_the_value_loss(flags):
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models, **flags)
    critic_backward(models.critic, experience, config)
    once = models.critic.gradients()
    critic_backward(models.critic, experience, replace(config, vf_loss_weight=0.25))
    torch.testing.assert_close(models.critic.gradients(), 0.25 * once)
    assert once.abs().max() > 1e-3
    # Values that went past the clip window towards their returns get no gradient.
    far = replace(experience, old_values=experience.old_values - 5.0, returns=experience.old_values + 50.0)
    critic_backward(models.critic, far, config)
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


def test_a_large_metric_that_is_no_loss_does_not_stop_the_step():
    """All ratios are e⁴⁰ and clipped: the loss is -1.2 A."""
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models, explosion_limit=1e3)
    far = torch.where(experience.response_mask, experience.old_logprobs - 40.0, 0.0)
    experience = replace(experience, old_logprobs=far, advantages=experience.response_mask.float())
    metrics = update(models.policy, models.critic, experience, config, 0, 1e-3, 1e-3)
    assert metrics["ratio_mean"] > 1e17 and metrics["approx_kl"] > 1e17
    assert metrics["policy_loss"] == pytest.approx(-1.2) and metrics["clip_fraction"] == 1.0
