"""From scores to experience by hand: the order of the tricks, each switch, metrics, bad scores and alarms."""

import math
from dataclasses import replace

import pytest
import torch

from ppo.alarms import alarms
from ppo.experience import experience_metrics, make_experience, negative_kl_warning, rollout_metrics, score_problem
from tests.helpers.parts import ppo_config, rollout_of, scores_of
from utils.moments import RunningMoments

PLAIN = {"use_reward_scaling": False, "use_reward_norm": False, "use_reward_clip": False, "use_advantage_norm": False}
ROLLOUT = rollout_of([[0, 1, 1, 0], [0, 0, 1, 1]], ended=[True, False])


def rewards(scores: list[float], moments: RunningMoments | None = None, ref_logprobs: float = -1.0, **flags):
    config = ppo_config(**PLAIN | {"kl_penalty_weight": 0.1} | flags)
    given = scores_of(ROLLOUT, scores, ref_logprobs=ref_logprobs)
    return make_experience(ROLLOUT, given, moments or RunningMoments(), config).rewards


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [[0.0, -0.2, 4.8, 0.0], [0.0, 0.0, -0.2, -1.2]]),  # kl = -1 - (-3) = 2 per token
        ({"kl_in": "loss", "kl_estimator": "k3"}, [[0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, -1.0]]),
        # The score is clipped before KL is added; clipping last would leave ±0.1.
        ({"use_reward_clip": True, "reward_clip": 0.1}, [[0.0, -0.2, -0.1, 0.0], [0.0, 0.0, -0.2, -0.3]]),
    ],
)
def test_score_and_kl_by_flags(flags, expected):
    torch.testing.assert_close(rewards([5.0, -1.0], ref_logprobs=-3.0, **flags), torch.tensor(expected))


def test_the_batch_joins_the_statistics_before_it_is_normalised():
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    # 1, 3, 5, 7: mean 4, squares 9 + 1 + 1 + 9 = 20 over 3
    shaped = rewards([5.0, 7.0], moments, use_reward_norm=True)
    deviation = math.sqrt(20 / 3)
    torch.testing.assert_close(shaped[:, 2:], torch.tensor([[1 / deviation, 0.0], [0.0, 3 / deviation]]))
    assert moments.count == 4


def test_clip_and_penalty_by_flags():
    """The penalty comes after the clip, in deviations of the score: 10 / √2 of 5 and -5, or 1 where they are scaled."""
    flags = {"use_reward_clip": True, "reward_clip": 0.3, "missing_eos_penalty": 2.0}
    raw, scaled = rewards([5.0, -5.0], **flags), rewards([5.0, -5.0], use_reward_scaling=True, **flags)
    torch.testing.assert_close(raw, torch.tensor([[0.0, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, -0.3 - 20 / math.sqrt(2)]]))
    torch.testing.assert_close(scaled, torch.tensor([[0.0, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, -2.3]]))


@pytest.mark.parametrize("norm", [False, True])
def test_returns_do_not_depend_on_normalised_or_clipped_advantages(norm):
    flags = PLAIN | {"use_advantage_norm": norm, "use_advantage_clip": True, "advantage_clip": 0.1}
    given = scores_of(ROLLOUT, [3.0, -1.0], values=0.5)
    experience = make_experience(ROLLOUT, given, RunningMoments(), ppo_config(**flags, gamma=1.0, lam=1.0))
    torch.testing.assert_close(experience.returns, torch.tensor([[0.0, 3.0, 3.0, 0.0], [0.0, 0.0, -1.0, -1.0]]))
    torch.testing.assert_close(experience.advantages, torch.tensor([[0.0, 0.1, 0.1, 0.0], [0.0, 0.0, -0.1, -0.1]]))


def test_advantages_are_whitened_over_the_whole_buffer():
    config = ppo_config(**PLAIN | {"use_advantage_norm": True}, lam=1.0)
    experience = make_experience(ROLLOUT, scores_of(ROLLOUT, [3.0, -1.0]), RunningMoments(), config)
    # 3, 3, -1, -1: mean 1, deviation 2
    torch.testing.assert_close(experience.advantages, torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, -1.0, -1.0]]))
    metrics = experience_metrics(experience, config)
    expected = {"advantage_mean": 0.0, "advantage_std": 1.0}
    critics = {"return_mean": 1.0, "value_mean": 0.0, "explained_variance": 0.0, "value_slope": 0.0, "value_bias": 1.0}
    critics |= {"explained_variance_1": 0.0, "explained_variance_3": 0.0}  # of two tokens each
    assert metrics == pytest.approx(expected | critics, abs=1e-5)
    assert experience_metrics(replace(experience, old_values=None, returns=None), config).keys() == expected.keys()


def test_rollout_metrics_by_hand():
    rollout = rollout_of([[0, 1, 1, 1], [0, 1, 0, 0]], ended=[True, False])
    logprobs = [[0.0, -1.0, -2.0, -3.0], [0.0, -3.0, 0.0, 0.0]]
    metrics = rollout_metrics(rollout, scores_of(rollout, [1.0, 4.0], logprobs, ref_logprobs=-2.5))
    expected = {
        "score_mean": 2.5, "score_std": 1.5, "response_length": 2.0, "eos_fraction": 0.5, "entropy": 2.0,
        "kl_ref": ((1.5 + 0.5 - 0.5) - 0.5) / 2,  # per response, not per token
        "perplexity": math.exp(9 / 4), "perplexity_ref": math.exp(2.5),
    }  # fmt: skip
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_negative_kl_warning_needs_a_large_batch():
    for count, ref_logprobs, warned in ((64, -0.5, True), (8, -0.5, False), (64, -1.5, False)):
        rollout = rollout_of([[0, 1]] * count)
        warning = negative_kl_warning(scores_of(rollout, [0.0] * count, ref_logprobs=ref_logprobs))
        assert ("below 0" in (warning or "")) is warned


def test_scores_beyond_the_limit_are_named_with_their_rank(monkeypatch):
    monkeypatch.setattr("utils.distributed.gather_objects", lambda own: [own, True])
    fine, bad = torch.tensor([0.0, 1.0]), torch.tensor([-6.0, 2.0])
    rollout = rollout_of([[0, 1]] * 4)
    assert score_problem(scores_of(rollout, [0.0, 1.0, -2.0, 3.0]), 5.0, fine) is None
    nan = score_problem(scores_of(rollout, [0.0, 1.0, math.nan, 3.0]), 5.0, fine)
    assert nan.startswith("the score of response 2 of this step is not finite (rank 1); ")
    large = scores_of(rollout, [-6.0, 1.0, 2.0, 3.0])
    assert "response 0 of this step is -6, beyond --explosion_limit (rank 0, 1)" in score_problem(large, 5.0, bad)
    parts = torch.tensor([[1.0, -7.0], [math.nan, 0.0], [0.0, 0.0], [0.0, 0.0]])
    said = replace(large, parts=parts, part_names=("reward_a", "reward_b"))
    assert score_problem(said, 5.0).endswith("check the reward model or --reward_fn (reward_b)")
    greedy = replace(scores_of(rollout, [0.0] * 4), baselines=torch.tensor([0.0, 0.0, math.inf, 1.0]))
    assert score_problem(greedy, 5.0).startswith("the score of the greedy response beside response 2 is not finite")


def test_alarms_by_threshold():
    metrics = {"kl_ref": 101.0, "perplexity": 1.01, "eos_fraction": 0.1, "response_length": 3.0, "score_std": 0.0}
    long, short = (ppo_config(maxlen_res=tokens, maxlen_prompt=tokens + 1) for tokens in (512, 24))
    flags = {"alarm_kl": 0, "alarm_perplexity": 0}
    others = {"alarm_eos": 0.2, "alarm_length": 4, "alarm_score_std": 1e-3}
    for changes, config, expected in (
        ({"kl_ref": 25.0, "perplexity": 2.0}, long, []),
        ({"kl_ref": 25.0, "perplexity": 2.0}, short, ["kl_ref 25 is past --alarm_kl 24"]),
        ({}, long, ["kl_ref 101 is past --alarm_kl 100", "perplexity 1.01 is past --alarm_perplexity 1.05"]),
        ({}, ppo_config(**flags), []),
    ):
        assert alarms(metrics | changes, config) == expected
    found = alarms(metrics, ppo_config(**flags | others))
    assert [text.split()[0] for text in found] == ["eos_fraction", "response_length", "score_std"]
