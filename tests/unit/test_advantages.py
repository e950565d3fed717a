"""GAE: numbers worked by hand, masks, and an independent definition (the sum of discounted TD errors)."""

import pytest
import torch

from ppo.advantages import gae


def run(rewards: list[float], values: list[float], gamma: float, lam: float, mask: list[int] | None = None):
    mask = torch.tensor([mask or [1] * len(rewards)]).bool()
    advantages, returns = gae(torch.tensor([rewards]), torch.tensor([values]), mask, gamma, lam)
    return advantages[0], returns[0]


def test_worked_without_lambda():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0])
    advantages, returns = run([0.0, 0.0, 1.0, 0.0], values.tolist(), 0.5, 0.0)
    torch.testing.assert_close(advantages, torch.tensor([0.5, 0.0, 0.5, -3.0]))
    torch.testing.assert_close(returns, advantages + values)


def test_worked_with_lambda():
    gamma, lam = 0.9, 0.95
    _, returns = run([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], gamma, lam)
    torch.testing.assert_close(returns, torch.tensor([gamma**3 * lam**2, gamma**2 * lam, gamma, 1.0]))


@pytest.mark.parametrize("strange", [999.0, float("nan"), float("inf")])
def test_gaps_and_padding_are_never_read(strange):
    rewards, values = [0.1, -0.2, 0.3, 1.0], [0.5, 0.4, -0.3, 0.2]
    plain, plain_returns = run(rewards, values, 0.9, 0.8)
    mask = [0, 1, 0, 1, 1, 0, 0, 1, 0]
    at = [i for i, inside in enumerate(mask) if inside]
    wide_rewards, wide_values = [strange] * 9, [strange] * 9
    for i, reward, value in zip(at, rewards, values):
        wide_rewards[i], wide_values[i] = reward, value
    advantages, returns = run(wide_rewards, wide_values, 0.9, 0.8, mask)
    torch.testing.assert_close(advantages[at], plain)
    torch.testing.assert_close(returns[at], plain_returns)
    outside = [i for i, inside in enumerate(mask) if not inside]
    assert advantages[outside].tolist() == returns[outside].tolist() == [0.0] * len(outside)


def test_equals_the_sum_of_discounted_td_errors():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 7, generator=generator), torch.randn(2, 7, generator=generator)
    gamma, lam = 0.97, 0.9
    following = torch.cat([values[:, 1:], torch.zeros(2, 1)], dim=1)
    errors = rewards + gamma * following - values
    expected = [[sum((gamma * lam) ** k * row[t + k] for k in range(7 - t)) for t in range(7)] for row in errors]
    advantages, _ = gae(rewards, values, torch.ones(2, 7).bool(), gamma, lam)
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_equals_a_loop_in_float64_on_ragged_rows():
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


def test_operations_do_not_grow_with_the_length():
    """Each operation is a launch on a GPU: a loop over 2,048 tokens made 16,000."""
    mask = torch.ones(2, 2048).bool()
    with torch.profiler.profile() as profile:
        gae(torch.ones(2, 2048), torch.ones(2, 2048), mask, 1.0, 0.95)
    assert len(profile.events()) < 300  # with the views, and those within others


def test_lambda_one_returns_are_the_discounted_rewards():
    _, returns = run([1.0, 2.0, 4.0], [0.3, -5.0, 8.0], 0.5, 1.0)
    torch.testing.assert_close(returns, torch.tensor([1 + 1 + 1, 2 + 2, 4.0]))


def test_rows_without_any_or_with_one_token():
    rewards, values = torch.tensor([[9.0, 1.0], [9.0, 9.0]]), torch.tensor([[9.0, 0.25], [9.0, 9.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[False, True], [False, False]]), 1.0, 0.95)
    assert advantages.tolist() == [[0.0, 0.75], [0.0, 0.0]]
    assert returns.tolist() == [[0.0, 1.0], [0.0, 0.0]]
