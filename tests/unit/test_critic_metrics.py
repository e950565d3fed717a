"""Diagnosis of the critic by hand: quarters, calibration, noise between responses to a prompt, the alarm."""

import pytest
import torch

from ppo.alarms import alarms
from ppo.critic_metrics import critic_metrics, explained_variance, return_noise
from tests.helpers.parts import ppo_config
from utils.errors import UserError

METRICS = {
    "kl_ref": 1.0, "perplexity": 5.0, "eos_fraction": 1.0, "response_length": 8.0, "score_std": 1.0,
    "policy_loss": 0.1, "explained_variance": 0.1,
}  # fmt: skip


def test_quarters_by_relative_place():
    """Eight tokens: two per quarter. Four tokens behind a prompt of two: one per quarter."""
    mask = torch.tensor([[True] * 8, [False] * 2 + [True] * 4 + [False] * 2])
    returns, values = torch.zeros(2, 8), torch.zeros(2, 8)
    returns[0] = torch.tensor([0.0, 1.0, 5.0, 6.0, 0.0, 3.0, 1.0, 1.0])
    returns[1, 2:6] = torch.tensor([2.0, 7.0, 6.0, 1.0])
    returns[1, 0], values[1, 7] = 1e6, 1e6  # outside
    values[0, :2], values[1, 2] = returns[0, :2], returns[1, 2]  # perfect in the first quarter
    values[0, 2:4], values[1, 3] = torch.tensor([-1.0, 0.0]), 1.0  # and in the second, but for a constant
    values[0, 4:6], values[1, 4] = torch.tensor([1.0, 2.0]), 3.0  # returns 0, 3, 6: variance 6; errors -1, 1, 3: 8/3
    found = critic_metrics(returns, values, mask)
    assert [float(found[f"explained_variance_{i}"]) for i in (1, 2, 3)] == pytest.approx([1.0, 1.0, 1 - (8 / 3) / 6])


def test_quarters_without_tokens_are_left_out():
    mask = torch.tensor([[True] * 2, [True, False]])  # places 0 and 1 of 2, and 0 of 1
    found = critic_metrics(torch.randn(2, 2), torch.randn(2, 2), mask)
    assert found.keys() == {"explained_variance_1", "value_slope", "value_bias"}


def test_calibration_by_hand():
    mask, values = torch.ones(1, 4).bool(), torch.tensor([[0.0, 2.0, 4.0, 6.0]])
    noise = torch.tensor([[1.0, -1.0, -1.0, 1.0]])  # no slope of its own
    found = critic_metrics(3.0 + 0.25 * values + noise, values, mask)
    assert float(found["value_slope"]) == pytest.approx(0.25)
    assert float(found["value_bias"]) == pytest.approx(3.0 + 0.25 * 3.0 - 3.0)


def test_noise_by_hand():
    """Returns 1, 3 and 5, 9: within (2 + 8) / 2 = 5; means 2 and 7 vary by 12.5; all 12.5 + 5 · (1 - 1/2) = 15."""
    mask = torch.tensor([[False, True, True]] * 5)
    rewards = torch.tensor([[1e6, 0.5, 0.5], [0.0, 0.0, 3.0], [0.0, 100.0, 0.0], [0.0, 4.0, 1.0], [0.0, 9.0, 0.0]])
    groups = torch.tensor([7, 7, 9, 8, 8])  # one prompt has a single response, which does not count
    assert float(return_noise(rewards, mask, groups, 1.0)) == pytest.approx(5.0 / 15.0)
    assert return_noise(rewards, mask, torch.arange(5), 1.0) is None
    assert return_noise(rewards, mask, torch.tensor([1, 1, 1, 1, 2]), 1.0) is None
    assert return_noise(torch.zeros(5, 3), mask, groups, 1.0) is None
    # γ 0.5: the returns are 0.75, 1.5 and 4.5, 9.
    within = (0.375**2 * 2 + 2.25**2 * 2) / 2
    expected = within / ((6.75 - 1.125) ** 2 / 2 + within / 2)
    assert float(return_noise(rewards, mask, groups, 0.5)) == pytest.approx(expected)


def test_noise_is_unbiased_in_uneven_groups():
    """Between prompts variance 1, within them 3: three quarters are noise, and a critic explains the rest at best."""
    generator = torch.Generator().manual_seed(1)
    groups = torch.arange(20_000).repeat_interleave(torch.tensor([2, 4, 3, 1]).repeat(5_000))
    prompt = torch.randn(20_000, generator=generator)[groups]
    rewards = (prompt + 3**0.5 * torch.randn(len(groups), generator=generator))[:, None]
    mask = torch.ones_like(rewards).bool()
    assert float(return_noise(rewards, mask, groups, 1.0)) == pytest.approx(0.75, abs=0.02)
    assert float(explained_variance(rewards, prompt[:, None])) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("limit", "value", "sounds"), [(None, -5.0, False), (0.0, -0.1, True), (0.0, 0.1, False), (0.2, 0.1, True)]
)
def test_alarm_of_the_explained_variance(limit, value, sounds):
    config, metrics = ppo_config(alarm_explained_variance=limit), METRICS | {"explained_variance": value}
    found = alarms(metrics, config)
    assert len(found) == sounds and all("--alarm_explained_variance" in text for text in found)
    alone = {name: x for name, x in metrics.items() if name != "policy_loss"}
    assert alarms(alone, config) == []  # only the critic trains


def test_the_alarm_needs_a_critic():
    with pytest.raises(UserError, match="--alarm_explained_variance 0: --advantage_estimator reinforce_pp"):
        ppo_config(advantage_estimator="reinforce_pp", alarm_explained_variance=0.0)
