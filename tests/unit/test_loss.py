"""The losses: worked numbers, clipping, gradients against plain formulas, and padding that holds NaN."""

import pytest
import torch

from ppo.loss import entropy_bonus, policy_clipped, policy_loss, value_clipped, value_loss

RATIO = torch.tensor([[0.5, 1.0, 1.5]])
ADVANTAGES = torch.tensor([[1.0, -1.0, 2.0]])
ALL = torch.ones(1, 3).bool()
NAN = float("nan")


def randoms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_worked_surrogate():
    # min(.5, .8), min(-1, -1), min(3, 2.4) -> -(0.5 - 1 + 2.4) / 3
    loss = policy_loss(RATIO.log(), torch.zeros(1, 3), ADVANTAGES, ALL, 0.2, 3.0)
    assert float(loss) == pytest.approx(-0.6333, abs=1e-4)


def test_without_clipping_the_plain_surrogate():
    loss = policy_loss(RATIO.log(), torch.zeros(1, 3), ADVANTAGES, ALL, 0.0, 3.0)
    assert float(loss) == pytest.approx(-(0.5 - 1 + 3) / 3)


def test_policy_gradient_by_hand():
    # -ρA / N where the surrogate is not cut, 0 where it is: too high with A > 0, too low with A < 0.
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 3.0]])
    logprobs = ratio.log().requires_grad_()
    policy_loss(logprobs, torch.zeros(1, 5), advantages, torch.ones(1, 5).bool(), 0.2, 5.0).backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 1.5, -0.5, 0.0, -3.3]]) / 5)
    assert policy_clipped(ratio, advantages, 0.2).tolist() == [[True, False, False, True, False]]


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


def test_value_loss_without_clipping_is_half_the_squared_error():
    values, returns = torch.tensor([[1.0, 9.0, 4.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    mask = torch.tensor([[True, False, True]])
    assert value_loss(values, torch.zeros(1, 3), returns, mask, 0.0, 2.0).item() == pytest.approx((0.5 + 4.5) / 2)


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


def test_splitting_a_batch_adds_up_to_the_same_loss():
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0]]).bool()
    x, a, b = (randoms(3, 4, seed=seed) for seed in range(3))
    for loss in (policy_loss, value_loss):
        whole = loss(x, a, b, mask, 0.2, 6.0)
        parts = [loss(x[rows], a[rows], b[rows], mask[rows], 0.2, 6.0) for rows in ([0], [1, 2])]
        torch.testing.assert_close(sum(parts), whole)


def test_entropy_bonus_stops_at_its_clip():
    entropy = torch.tensor([[1.0, 3.0, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    bonus = entropy_bonus(entropy, mask, 2.0, 2.0)
    bonus.backward()
    assert bonus.item() == pytest.approx((1 + 2) / 2)
    assert entropy.grad.tolist() == [[0.5, 0.0, 0.0]]
    assert entropy_bonus(entropy, mask, 0.0, 2.0).item() == pytest.approx((1 + 3) / 2)
