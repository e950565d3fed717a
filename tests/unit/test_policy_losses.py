"""The policy loss beyond PPO's: clip-higher, dual clip, sequence ratio, no ratio; averages; the adaptive KL weight."""

from dataclasses import replace

import pytest
import torch

from ppo.kl import adapted
from ppo.loss import policy_clipped, policy_loss, policy_ratio, row_weights
from ppo.rewards import overlong_penalty
from ppo.update import policy_backward
from tests.helpers.parts import PROMPTS, ppo_config, rollout_by_hand, scored, tiny_models
from utils.errors import UserError

ONE = torch.ones(1, 3, dtype=torch.bool)
RATIO, ADVANTAGES = torch.tensor([[0.5, 1.0, 1.5]]), torch.tensor([[1.0, -1.0, 2.0]])


def loss_of(ratio, advantages, mask=ONE, clip=0.2, **more) -> float:
    zero = torch.zeros_like(advantages)
    return float(policy_loss(ratio.log(), zero, advantages, mask, clip, float(mask.sum()), **more))


def test_clip_higher_by_hand():
    """ρ 1.5 with A 2: min(3, 1.2 · 2) = 2.4, and with 0.28 above, 2.56. ρ 0.5 with A 1 is not clipped from below."""
    assert loss_of(RATIO, ADVANTAGES) == pytest.approx(-(0.5 - 1.0 + 2.4) / 3)
    assert loss_of(RATIO, ADVANTAGES, clip_high=0.28) == pytest.approx(-(0.5 - 1.0 + 2.56) / 3)
    assert loss_of(RATIO, -ADVANTAGES, clip_high=0.28) == pytest.approx(-(-0.8 + 1.0 - 3.0) / 3)  # 0.5 -> 1 - 0.2


def test_dual_clip_by_hand():
    """ρ 10 with A -1 costs 10, and 3 with the limit, where its gradient is gone; A 1 is clipped as ever."""
    ratio, minus = torch.tensor([[10.0, 2.0, 10.0]]), torch.tensor([[-1.0, -1.0, 1.0]])
    assert loss_of(ratio, minus) == pytest.approx((10 + 2 - 1.2) / 3)
    assert loss_of(ratio, minus, dual_clip=3.0) == pytest.approx((3 + 2 - 1.2) / 3)
    logprobs = ratio.log().requires_grad_()
    policy_loss(logprobs, torch.zeros(1, 3), minus, ONE, 0.2, 3.0, dual_clip=3.0).backward()
    removed = policy_clipped(ratio, minus, 0.2, None, 3.0)
    assert (logprobs.grad == 0).tolist() == removed.tolist() == [[True, False, True]]


def test_sequence_ratio_is_the_geometric_mean():
    """GSPO's objective of a response of three tokens, and its gradient by autograd on the formula itself."""
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    old = torch.tensor([[9.0, -1.0, -2.0, -3.0], [9.0, -1.0, 9.0, 9.0]])
    logprobs = torch.tensor([[7.0, -1.1, -1.7, -3.3], [7.0, -1.5, 7.0, 7.0]], requires_grad=True)
    ratio = policy_ratio(logprobs, old, mask, "sequence")
    means = [(-0.1 + 0.3 - 0.3) / 3, -0.5]
    expected = torch.tensor([[0, *[means[0]] * 3], [0, means[1], 0, 0]]).exp()
    torch.testing.assert_close(ratio.detach(), expected)
    advantages = torch.tensor([[0, 2.0, 2.0, 2.0], [0, 0.7, 0, 0]])
    rows = row_weights(mask, None, "sequence", 8)
    policy_loss(logprobs, old, rows[:, None] * advantages, mask, 0.2, 4.0, kind="sequence").backward()
    again = logprobs.detach().clone().requires_grad_()
    s = torch.stack([(again - old)[i][mask[i]].mean().exp() for i in (0, 1)])
    a = torch.tensor([2.0, 0.7])
    (-torch.minimum(s * a, s.clamp(0.8, 1.2) * a).mean()).backward()
    torch.testing.assert_close(logprobs.grad, again.grad)


def test_without_ratio_the_gradient_is_that_of_the_old_policy():
    """REINFORCE: -A per token, however far the policy has moved since; ρ = 1 gives the surrogate's gradient."""
    advantages, old = torch.tensor([[1.0, -2.0, 0.5]]), torch.zeros(1, 3)
    for moved in (0.0, 3.0):
        logprobs = (old + moved).requires_grad_()
        policy_loss(logprobs, old, advantages, ONE, 0.2, 3.0, kind="none").backward()
        torch.testing.assert_close(logprobs.grad, -advantages / 3)
    logprobs = old.clone().requires_grad_()
    policy_loss(logprobs, old, advantages, ONE, 0.2, 3.0).backward()
    torch.testing.assert_close(logprobs.grad, -advantages / 3)


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
LOSSES = torch.tensor([[1.0, 2, 3, 4], [10, 20, 0, 0], [0, 0, 0, 0], [100, 0, 0, 0]])
GROUPS = torch.tensor([5, 5, 5, 2])
AVERAGES = {"token": 140 / 7, "sequence": (2.5 + 15 + 100) / 3, "group": (40 / 6 + 100) / 2, "constant": 140 / (3 * 8)}


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_by_hand(average):
    """Lengths 4, 2, 0 and 1: the empty response counts nowhere."""
    weights = row_weights(MASK, GROUPS, average, 8)
    assert float((weights[:, None] * LOSSES).sum() / 7) == pytest.approx(AVERAGES[average])
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(row_weights(MASK[order], GROUPS[order] * 7, average, 8), weights[order])


@pytest.mark.parametrize("flags", [
    {"loss_average": "group"}, {"loss_average": "constant"}, {"loss_average": "sequence", "policy_ratio": "sequence"},
    {"loss_average": "sequence", "kl_in": "loss", "kl_estimator": "k3", "use_entropy_loss": True,
     "entropy_loss_weight": 0.1},
])  # fmt: skip
def test_micro_batches_change_no_average(flags):
    """One micro-batch or one per row: the same loss and gradient."""
    models, gradients, losses = tiny_models(), [], []
    experience, config = scored(rollout_by_hand(), models, **flags)
    experience = replace(experience, groups=torch.tensor([1, 0, 1, 0]))
    for size in (1000, 1):
        loss, _ = policy_backward(models.policy, experience, replace(config, micro_batch_tokens=size), None)
        losses.append(float(loss))
        gradients.append(models.policy.gradients())
    assert len(PROMPTS) == 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    policy_backward(models.policy, experience, replace(config, loss_average="token"), None)
    assert not torch.allclose(models.policy.gradients(), gradients[0], rtol=1e-2)  # or the average would not matter


def test_kl_weight_adapts_within_limits():
    """A quarter of the horizon, with a KL 10 % above, then far above, then far below its target."""
    assert adapted(0.1, 6.6, 6.0, 250, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.25))
    assert adapted(0.1, 60.0, 6.0, 250, 1000) == pytest.approx(0.1 * (1 + 0.2 * 0.25))
    assert adapted(0.1, 0.0, 6.0, 250, 1000) == pytest.approx(0.1 * (1 - 0.2 * 0.25))


def test_overlong_penalty_by_hand():
    """Limit 20, buffer 4, factor 2: nothing up to 16, half at 18, all from 20 on."""
    lengths = torch.tensor([3, 16, 18, 20, 25])
    assert overlong_penalty(lengths, 20, 4, 2.0).tolist() == [0.0, 0.0, -1.0, -2.0, -2.0]


@pytest.mark.parametrize("flags", [
    {"overlong_buffer": 9}, {"dual_clip": 0.5}, {"pg_clip_high": 0.3, "use_policy_loss_clip": False},
    {"pg_clip_high": 0.0}, {"kl_target": 6.0, "kl_penalty_weight": 0.0},
])  # fmt: skip
def test_flags_that_make_no_sense(flags):
    with pytest.raises(UserError, match=f"--{next(iter(flags))}"):
        ppo_config(**flags)
