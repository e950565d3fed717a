"""KL estimators, token rewards, GAE and losses by hand, in plain loops, and with NaN in the padding.

Compared with the numbers of the released code in tests/golden.
"""

import math

import pytest
import torch

from ppo.advantages import gae
from ppo.kl import KL_ESTIMATORS
from ppo.loss import entropy_bonus, policy_loss, value_clipped, value_loss
from ppo.rewards import shape_scores, token_rewards
from utils.moments import RunningMoments

LOGPROBS = torch.tensor([-1.0, -1.0, -1.0])
REF_LOGPROBS = torch.tensor([0.0, -15.0, -30.0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("k1", [-1.0, 14.0, 29.0]), ("k2", [0.5, 98.0, 420.5]), ("k3", [math.e - 2, 13.0, 28.0])],
)
def test_kl_estimators_by_hand(name, expected):
    torch.testing.assert_close(KL_ESTIMATORS[name](LOGPROBS, REF_LOGPROBS), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_kl_is_unbiased_under_the_policy(name):
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist()))
    expected = (policy * KL_ESTIMATORS[name](policy.log(), reference.log())).sum()
    assert float(expected) == pytest.approx(exact, rel=1e-5)


def test_k3_keeps_small_differences():
    # exp(d) - 1 loses d = 1e-4 to rounding; d²/2 is the answer to first order.
    assert float(KL_ESTIMATORS["k3"](torch.tensor(-1e-4), torch.tensor(0.0))) == pytest.approx(5e-9, rel=2e-3)


MASK = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
NO_PENALTY = torch.zeros(3)


def moments_of(*numbers: float) -> RunningMoments:
    moments = RunningMoments()
    moments.update(torch.tensor(numbers))
    return moments


def test_score_on_the_last_response_token_and_kl_on_all():
    kl = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 9.0, -3.0, 4.0], [9.0, 9.0, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([1.0, -2.0, 5.0]), kl, MASK, kl_coef=0.1)
    expected = [[0.0, -0.1, 0.8, 0.0], [0.0, 0.0, 0.3, -2.4], [0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_rewards_read_no_nan_outside_the_response():
    kl = torch.where(MASK, 1.0, float("nan"))
    assert torch.isfinite(token_rewards(torch.ones(3), kl, MASK, 0.1)).all()


@pytest.mark.parametrize(
    ("center", "scale", "clip", "expected"),
    [
        (True, True, 0.0, [-1.0, 0.0, 1.0]),
        (True, False, 0.0, [-1.0, 0.0, 1.0]),  # --use_reward_norm works on its own
        (False, True, 0.0, [0.5, 1.5, 2.5]),
        (False, False, 0.0, [1.0, 3.0, 5.0]),
        (True, True, 0.3, [-0.3, 0.0, 0.3]),
        (False, True, 2.0, [0.5, 1.5, 2.0]),
        (False, False, 4.0, [1.0, 3.0, 4.0]),
    ],
)
def test_shaping_of_scores(center, scale, clip, expected):
    # 1, 3, 5: mean 3, sample deviation 2
    shaped = shape_scores(torch.tensor([1.0, 3.0, 5.0]), moments_of(1, 3, 5), center, scale, clip, NO_PENALTY)
    torch.testing.assert_close(shaped, torch.tensor(expected))


def test_penalty_for_a_missing_end_comes_after_the_clipping():
    penalty = torch.tensor([0.0, -1.0, -1.0])
    shaped = shape_scores(torch.tensor([9.0, 9.0, -9.0]), RunningMoments(), False, False, 0.3, penalty)
    torch.testing.assert_close(shaped, torch.tensor([0.3, -0.7, -1.3]))


def test_gae_equals_a_loop_in_float64_on_ragged_rows():
    generator = torch.Generator().manual_seed(1)
    for length in (1, 2, 63, 64, 65, 300):
        rewards, values = torch.randn(2, 5, length, generator=generator)
        mask = torch.rand(5, length, generator=generator) < torch.tensor([[1.0], [0.9], [0.5], [0.1], [0.0]])
        expected = torch.zeros(5, length)
        for i in range(5):
            advantage = value = 0.0
            for t in reversed(mask[i].nonzero().flatten().tolist()):
                advantage = float(rewards[i, t]) + 0.99 * value - float(values[i, t]) + 0.99 * 0.95 * advantage
                value, expected[i, t] = float(values[i, t]), advantage
        strange = [x.masked_fill(~mask, float("nan")) for x in (rewards, values)]
        advantages, returns = gae(*strange, mask, 0.99, 0.95)
        torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=2e-7)
        torch.testing.assert_close(returns, (expected + values).masked_fill(~mask, 0.0), atol=1e-6, rtol=2e-7)


def test_operations_of_gae_do_not_grow_with_the_length():
    """Each operation is a launch on a GPU: a loop over 2,048 tokens made 16,000."""
    mask = torch.ones(2, 2048).bool()
    with torch.profiler.profile() as profile:
        gae(torch.ones(2, 2048), torch.ones(2, 2048), mask, 1.0, 0.95)
    assert len(profile.events()) < 300  # with the views, and those within others


NAN = float("nan")


def randoms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_policy_gradient_against_a_plain_loop():
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]]).bool()
    old, advantages = randoms(2, 4, seed=1) - 2, randoms(2, 4, seed=2)
    ours = (old + randoms(2, 4, seed=3)).requires_grad_()
    policy_loss(ours, old, advantages, mask, 0.2, 4.0).backward()
    theirs = ours.detach().clone().requires_grad_()
    total = torch.zeros(())
    for i, j in mask.nonzero().tolist():
        ratio, advantage = torch.exp(theirs[i, j]) / torch.exp(old[i, j]), advantages[i, j]
        if (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8):
            continue  # a constant
        total = total - ratio * advantage / 4
    total.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("value", "expected", "counted"),
    [
        # old 1, clip .2. R 3: the clipped 1.2 is farther off than 2, its square counts and nothing flows.
        (2.0, 0.5 * 1.8**2, True),
        (1.1, 0.5 * 1.9**2, False),  # inside the window
        (-1.0, 0.5 * 4.0**2, False),  # left the window away from R: the larger, unclipped square pulls it back
    ],
)
def test_value_clipping_is_around_the_old_value(value, expected, counted):
    values = torch.tensor([[value]], requires_grad=True)
    old, returns, one = torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.ones(1, 1).bool()
    loss = value_loss(values, old, returns, one, 0.2, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert values.grad.item() == pytest.approx(0.0 if counted else value - 3.0)
    assert value_clipped(values, old, returns, 0.2).item() is counted


def test_values_that_stayed_near_are_not_counted_for_rounding():
    """old + (value - old) is another float32 than value for some of these."""
    generator = torch.Generator().manual_seed(0)
    old, values = (0.1 * torch.randn(1, 4000, generator=generator) for _ in range(2))
    near = (values - old).abs() < 0.2
    assert near.sum() > 1000 and not value_clipped(values, old, torch.zeros_like(old), 0.2)[near].any()


def test_nan_in_padding_changes_neither_losses_nor_gradients():
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]]).bool()
    tensors = [randoms(2, 4, seed=seed) for seed in range(4)]

    def losses(outside: float) -> tuple[torch.Tensor, torch.Tensor]:
        x, a, b, c = (torch.where(mask, tensor, outside) for tensor in tensors)
        x.requires_grad_()
        total = policy_loss(x, a, b, mask, 0.2, 3.0) + value_loss(x, a, b, mask, 0.2, 3.0)
        total = total - entropy_bonus(x + c, mask, 0.5, 3.0)
        total.backward()
        return total.detach(), x.grad

    loss, gradient = losses(NAN)
    expected_loss, expected_gradient = losses(0.0)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient, expected_gradient)
    assert not gradient[~mask].any()


def test_entropy_bonus_stops_at_its_clip():
    entropy = torch.tensor([[1.0, 3.0, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    bonus = entropy_bonus(entropy, mask, 2.0, 2.0)
    bonus.backward()
    assert bonus.item() == pytest.approx((1 + 2) / 2)
    assert entropy.grad.tolist() == [[0.5, 0.0, 0.0]]
    assert entropy_bonus(entropy, mask, 0.0, 2.0).item() == pytest.approx((1 + 3) / 2)
