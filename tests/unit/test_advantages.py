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


def test_lambda_one_returns_are_the_discounted_rewards():
    _, returns = run([1.0, 2.0, 4.0], [0.3, -5.0, 8.0], 0.5, 1.0)
    torch.testing.assert_close(returns, torch.tensor([1 + 1 + 1, 2 + 2, 4.0]))


def test_rows_without_any_or_with_one_token():
    rewards, values = torch.tensor([[9.0, 1.0], [9.0, 9.0]]), torch.tensor([[9.0, 0.25], [9.0, 9.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[False, True], [False, False]]), 1.0, 0.95)
    assert advantages.tolist() == [[0.0, 0.75], [0.0, 0.0]]
    assert returns.tolist() == [[0.0, 1.0], [0.0, 0.0]]
