"""The update: which terms the objective has, what a step touches, and what stops it."""

import math
from dataclasses import replace

import pytest
import torch

from data.dialogues import EncodedDialogue
from ppo.types import Experience
from ppo.update import critic_backward, policy_backward, policy_objective, update
from tests.helpers.parts import GradientEngine, ppo_config, rollout_by_hand, scored, tiny_models
from utils.errors import UserError

MASK = torch.tensor([[False, True, True, False]])
LOGPROBS = torch.tensor([[9.0, -1.0, -2.0, 9.0]])
ENTROPY = torch.tensor([[9.0, 1.0, 3.0, 9.0]])
PRETRAIN = [
    EncodedDialogue([1, 5, 6, 2], [False, False, True, True]),
    EncodedDialogue([1, 7, 2], [False, True, True]),
]


def objective(ratio: float = 1.0, **flags) -> tuple[float, dict[str, float]]:
    """Loss and sums of two tokens with advantages 1 and 3, reference log-probs -2 and -4, and this ratio."""
    zeros, old = torch.zeros(1, 4), LOGPROBS - math.log(ratio)
    advantages, reference = torch.tensor([[9.0, 1.0, 3.0, 9.0]]), torch.tensor([[9.0, -2.0, -4.0, 9.0]])
    part = Experience(zeros.long(), MASK, MASK, old, reference, zeros, zeros, advantages, zeros)
    loss, sums = policy_objective(part, LOGPROBS, ENTROPY, ppo_config(**flags), 2.0)
    return float(loss), {key: float(value) for key, value in sums.items()}


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


def test_sums_for_the_metrics_by_hand():
    # Both advantages are positive: a ratio that is too low is not clipped. KL(old, new) by k3: ρ - 1 - ln ρ.
    for ratio, clipped in ((1.5, 2.0), (0.5, 0.0)):
        _, sums = objective(ratio, kl_in="loss", kl_estimator="k2")
        surrogate = -4.0 * min(ratio, 1.2)
        kl = 2 * (ratio - 1 - math.log(ratio))
        expected = {"policy_loss": surrogate, "approx_kl": kl, "clip_fraction": clipped, "ratio_mean": 2 * ratio}
        assert sums == pytest.approx(expected, rel=1e-5)


def weights(engine: GradientEngine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.module.parameters()])


def test_without_a_learning_rate_only_the_critic_moves():
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models)
    policy, critic = weights(models.policy), weights(models.critic)
    metrics = update(models.policy, models.critic, experience, config, 0, 0.0, 1e-2)
    assert torch.equal(weights(models.policy), policy) and not torch.equal(weights(models.critic), critic)
    assert "value_loss" in metrics and "policy_loss" not in metrics


def test_every_epoch_visits_every_sample_once_in_whole_batches(monkeypatch):
    models, steps = tiny_models(), []
    experience, config = scored(rollout_by_hand(), models, batch_size=2, ppo_epochs=3)
    experience = replace(experience, sequences=experience.sequences.clone())
    monkeypatch.setattr(models.policy, "step", lambda lr, provided: steps.append(lr) or 1.0, raising=False)
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
    assert metrics["value_loss"] == pytest.approx(
        float(0.5 * (values - experience.returns).square().sum() / 12), rel=1e-4
    )
    assert metrics["policy_loss"] == pytest.approx(float(-experience.advantages.sum() / 12), abs=1e-5)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)


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
    unclipped = models.critic.gradients()
    # Values moved away from the returns: the unclipped square is the larger, so clipping changes nothing here...
    torch.testing.assert_close(once, unclipped)
    # ... but values that ran past the window towards their returns get no gradient.
    experience = replace(experience, returns=experience.old_values + 50.0)
    critic_backward(models.critic, experience, config)
    assert bool(models.critic.gradients().any()) is bool(flags)


def test_pretraining_joins_the_same_step_with_its_weight():
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models, ppo_pretrain_loss_weight=0.5)
    policy_backward(models.policy, experience, config, None)
    alone = models.policy.gradients()
    sums, _ = policy_backward(models.policy, experience, replace(config, micro_batch_tokens=4), PRETRAIN)
    together = models.policy.gradients()
    lm = models.policy.module.lm
    nll = [
        -torch.log_softmax(lm(torch.tensor([ids])).logits[0, :-1], -1)[
            torch.tensor(mask[1:]), torch.tensor(ids[1:])[mask[1:]]
        ]
        for ids, mask in ((dialogue.ids, dialogue.answer_mask) for dialogue in PRETRAIN)
    ]
    loss = torch.cat(nll).mean()
    (0.5 * loss).backward()
    torch.testing.assert_close(together - alone, models.policy.gradients(), atol=1e-6, rtol=1e-4)
    assert sums["pretrain_loss"] / sums["pretrain_tokens"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["advantages", "returns"])
def test_a_loss_that_is_not_finite_stops_before_the_step(name):
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models)
    broken = getattr(experience, name).clone()
    broken[experience.response_mask] = math.nan
    before = weights(models.policy if name == "advantages" else models.critic)
    with pytest.raises(UserError, match="not finite; no weights were changed"):
        update(models.policy, models.critic, replace(experience, **{name: broken}), config, 0, 1e-3, 1e-3)
    assert torch.equal(weights(models.policy if name == "advantages" else models.critic), before)
