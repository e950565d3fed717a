"""From scores to experience: the order of the tricks, each switch, and the metrics, by hand."""

import math

import pytest
import torch

from ppo.experience import experience_metrics, make_experience, negative_kl_warning, rollout_metrics
from tests.helpers.parts import ppo_config, rollout_of, scores_of
from utils.errors import UserError
from utils.moments import RunningMoments

PLAIN = {"use_reward_scaling": False, "use_reward_norm": False, "use_reward_clip": False, "use_advantage_norm": False}
ROLLOUT = rollout_of([[0, 1, 1, 0], [0, 0, 1, 1]], ended=[True, False])


def rewards(scores: list[float], moments: RunningMoments | None = None, ref_logprobs: float = -1.0, **flags):
    config = ppo_config(**PLAIN | {"kl_penalty_weight": 0.1} | flags)
    given = scores_of(ROLLOUT, scores, ref_logprobs=ref_logprobs)
    return make_experience(ROLLOUT, given, moments or RunningMoments(), config).rewards


def test_without_tricks_score_and_kl_alone():
    # kl = -1 - (-3) = 2 a token
    expected = [[0.0, -0.2, 4.8, 0.0], [0.0, 0.0, -0.2, -1.2]]
    torch.testing.assert_close(rewards([5.0, -1.0], ref_logprobs=-3.0), torch.tensor(expected))


def test_the_batch_joins_the_statistics_before_it_is_normalised():
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    # 1, 3, 5, 7: mean 4, squares 9 + 1 + 1 + 9 = 20 over 3
    shaped = rewards([5.0, 7.0], moments, use_reward_norm=True)
    deviation = math.sqrt(20 / 3)
    torch.testing.assert_close(shaped[:, 2:], torch.tensor([[1 / deviation, 0.0], [0.0, 3 / deviation]]))
    assert moments.count == 4


def test_statistics_gather_even_when_nothing_uses_them():
    moments = RunningMoments()
    rewards([5.0, 7.0], moments)
    assert (moments.count, moments.mean) == (2, 6.0)


def test_clip_and_penalty_by_flags():
    """The penalty comes after the clip, in deviations of the score: 10 / √2 of 5 and -5, or 1 where they are scaled."""
    flags = {"use_reward_clip": True, "reward_clip": 0.3, "missing_eos_penalty": 2.0}
    raw, scaled = rewards([5.0, -5.0], **flags), rewards([5.0, -5.0], use_reward_scaling=True, **flags)
    torch.testing.assert_close(raw, torch.tensor([[0.0, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, -0.3 - 20 / math.sqrt(2)]]))
    torch.testing.assert_close(scaled, torch.tensor([[0.0, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, -2.3]]))


def test_kl_goes_into_the_loss_or_the_reward_never_both():
    shaped = rewards([5.0, -1.0], ref_logprobs=-3.0, kl_in="loss", kl_estimator="k3")
    torch.testing.assert_close(shaped, torch.tensor([[0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, -1.0]]))


def test_estimator_by_flag():
    shaped = rewards([0.0, 0.0], ref_logprobs=-3.0, kl_estimator="k2")
    torch.testing.assert_close(shaped[0], torch.tensor([0.0, -0.2, -0.2, 0.0]))


@pytest.mark.parametrize("norm", [False, True])
def test_returns_do_not_know_of_normalised_or_clipped_advantages(norm):
    config = ppo_config(
        **PLAIN | {"use_advantage_norm": norm}, use_advantage_clip=True, advantage_clip=0.1, gamma=1.0, lam=1.0
    )
    given = scores_of(ROLLOUT, [3.0, -1.0], values=0.5)
    experience = make_experience(ROLLOUT, given, RunningMoments(), config)
    torch.testing.assert_close(experience.returns, torch.tensor([[0.0, 3.0, 3.0, 0.0], [0.0, 0.0, -1.0, -1.0]]))
    torch.testing.assert_close(experience.advantages, torch.tensor([[0.0, 0.1, 0.1, 0.0], [0.0, 0.0, -0.1, -0.1]]))


def test_advantages_are_whitened_over_the_whole_buffer():
    config = ppo_config(**PLAIN | {"use_advantage_norm": True}, lam=1.0)
    experience = make_experience(ROLLOUT, scores_of(ROLLOUT, [3.0, -1.0]), RunningMoments(), config)
    # 3, 3, -1, -1: mean 1, deviation 2
    torch.testing.assert_close(experience.advantages, torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, -1.0, -1.0]]))
    metrics = experience_metrics(experience)
    assert metrics["advantage_mean"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["advantage_std"] == pytest.approx(1.0, abs=1e-5)
    assert (metrics["return_mean"], metrics["value_mean"], metrics["explained_variance"]) == (1.0, 0.0, 0.0)


def test_score_that_is_not_finite_stops_the_run_before_the_statistics_take_it_in():
    moments = RunningMoments()
    with pytest.raises(UserError, match="score of response 1 of this step is not finite"):
        rewards([1.0, float("nan")], moments)
    assert moments.count == 0


def test_rollout_metrics_by_hand():
    rollout = rollout_of([[0, 1, 1, 1], [0, 1, 0, 0]], ended=[True, False])
    logprobs = [[0.0, -1.0, -2.0, -3.0], [0.0, -2.0, 0.0, 0.0]]
    metrics = rollout_metrics(rollout, scores_of(rollout, [1.0, 4.0], logprobs, ref_logprobs=-2.5))
    expected = {
        "score_mean": 2.5, "score_std": 1.5, "response_length": 2.0, "eos_fraction": 0.5, "entropy": 2.0,
        "kl_ref": ((1.5 + 0.5 - 0.5) + 0.5) / 2,  # a response, not a token
        "perplexity": math.exp(8 / 4), "perplexity_ref": math.exp(2.5),
    }  # fmt: skip
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_negative_kl_warning_needs_a_large_batch():
    def warning(count: int, ref_logprobs: float) -> str | None:
        rollout = rollout_of([[0, 1]] * count)
        return negative_kl_warning(rollout, scores_of(rollout, [0.0] * count, ref_logprobs=ref_logprobs))

    assert "below 0" in warning(64, ref_logprobs=-0.5)
    assert warning(8, ref_logprobs=-0.5) is None
    assert warning(64, ref_logprobs=-1.5) is None
