"""Penalties in the rewards, scores per token, the adaptive weight of the KL, and flags of losses that do not fit."""

import math
from dataclasses import replace

import pytest
import torch

from ppo.experience import make_experience
from ppo.kl import adapted
from ppo.rewards import overlong_penalty, per_token
from ppo.update import policy_backward
from tests.helpers.parts import ppo_config, rollout_by_hand, rollout_of, scored, scores_of, tiny_models
from utils.errors import UserError
from utils.moments import RunningMoments


def test_kl_weight_by_hand():
    """1.5 of its target counts as 1.2: 0.1 · (1 + 0.2 · 128 / 1280). A target that is met changes nothing."""
    assert adapted(0.1, 9.0, 6.0, 128, 1280) == pytest.approx(0.102)
    assert adapted(0.1, 6.6, 6.0, 128, 1280) == pytest.approx(0.101)
    assert adapted(0.1, 6.0, 6.0, 128, 1280) == 0.1
    assert adapted(0.1, -3.0, 6.0, 128, 1280) == pytest.approx(0.098)
    assert adapted(0.1, 0.0, 6.0, 12800, 1280) == pytest.approx(0.08)  # never below 0
    coef, kl = 0.1, 12.0
    for _ in range(200):  # a KL that is inversely proportional to the weight settles at the target
        coef = adapted(coef, kl, 6.0, 128, 1280)
        kl = 1.2 / coef
    assert kl == pytest.approx(6.0, rel=0.01)


@pytest.mark.parametrize(("place", "estimator"), [("reward", "k1"), ("loss", "k2")])
def test_the_adapted_weight_takes_the_place_of_the_flag(place, estimator):
    """In the rewards or in the loss, wherever --kl_in says, and nowhere else."""
    found = {}
    for name, weight, coef in (("flag", 0.3, None), ("adapted", 0.1, 0.3), ("neither", 0.1, None)):
        models = tiny_models()
        experience, config = scored(
            rollout_by_hand(), models, kl_in=place, kl_estimator=estimator, kl_penalty_weight=weight
        )
        rollout = rollout_of([[0, 1, 1, 0]])
        given = scores_of(rollout, [1.0], ref_logprobs=-3.0)
        rewards = make_experience(rollout, given, RunningMoments(), config, coef).rewards
        policy_backward(models.policy, replace(experience, advantages=0 * experience.advantages), config, None, coef)
        found[name] = torch.cat([rewards.flatten(), models.policy.gradients()])
    assert torch.equal(found["flag"], found["adapted"])
    assert not torch.equal(found["neither"], found["adapted"])


def test_overlong_penalty_by_hand():
    """DAPO eq. 13 with limit 10 and buffer 4: 0 up to 6 tokens, then a quarter per token, at most 1; times 2."""
    lengths = torch.tensor([0, 6, 7, 9, 10, 12])
    expected = [0.0, 0.0, -0.5, -1.5, -2.0, -2.0]
    torch.testing.assert_close(overlong_penalty(lengths, 10, 4, 2.0), torch.tensor(expected))


def last_rewards(scores: list[float], **flags) -> tuple[list[float], RunningMoments]:
    """(reward of each response, moments) of responses of 1, 2, 4 and 0 tokens, without KL."""
    rollout = rollout_of([[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    moments = RunningMoments()
    plain = dict.fromkeys(("use_reward_scaling", "use_reward_norm", "use_reward_clip", "use_advantage_norm"), False)
    experience = make_experience(rollout, scores_of(rollout, scores), moments, ppo_config(**plain | flags))
    return experience.rewards.sum(1).tolist(), moments


def test_scores_per_token_join_the_statistics():
    found, moments = last_rewards([1.0, 3.0, 6.0, 9.0], use_length_norm=True)
    assert found == pytest.approx([1.0, 1.5, 1.5, 0.0])  # an empty response has no token to carry its score
    assert moments.mean == pytest.approx((1 + 1.5 + 1.5 + 9) / 4)
    scores = per_token(torch.tensor([9.0, 9.0]), torch.tensor([[0, 0, 0], [1, 1, 1]]).bool())
    assert scores.tolist() == [9.0, 3.0]


def test_the_overlong_penalty_is_in_deviations_of_the_score_and_after_the_clip():
    """Scores 0, 0, 2, 2 have a deviation of 2/√3. --overlong_length 4, buffer 2: 0, 0 and all of the penalty."""
    flags = {"overlong_buffer": 2, "overlong_length": 4, "overlong_penalty": 3.0, "use_reward_clip": True}
    deviation = 2 / math.sqrt(3)
    raw, _ = last_rewards([0.0, 0.0, 2.0, 2.0], **flags, reward_clip=0.3)
    assert raw == pytest.approx([0.0, 0.0, 0.3 - 3.0 * deviation, 0.0])
    scaled, _ = last_rewards([0.0, 0.0, 2.0, 2.0], **flags, reward_clip=0.3, use_reward_scaling=True)
    assert scaled == pytest.approx([0.0, 0.0, 0.3 - 3.0, 0.0])
    limit, _ = last_rewards([0.0, 0.0, 2.0, 2.0], overlong_buffer=8)  # --maxlen_res 8: 1/8, 2/8 and 4/8
    assert limit == pytest.approx([-deviation / 8, -deviation / 4, 2 - deviation / 2, 0.0])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"overlong_buffer": 9}, "--overlong_buffer 9 is longer than a response may be (8 tokens)"),
        ({"overlong_buffer": 5, "overlong_length": 4}, "(4 tokens)"),
        ({"overlong_length": 4}, "--overlong_length 4 needs --overlong_buffer above 0"),
        ({"dual_clip": 0.5}, "--dual_clip 0.5 must be above 1"),
        ({"dual_clip": 1.0}, "--dual_clip 1 must be above 1"),
        ({"pg_clip_high": 0.0}, "and a number above 0"),
        ({"pg_clip_high": 0.3, "use_policy_loss_clip": False}, "needs --use_policy_loss_clip true"),
        ({"pg_clip_high": 0.3, "policy_ratio": "none"}, "--pg_clip_high with --policy_ratio none"),
        ({"dual_clip": 3.0, "policy_ratio": "none"}, "--dual_clip with --policy_ratio none"),
        ({"advantage_estimator": "reinforce_pp", "value_norm": "popart"}, "--value_norm popart: --advantage_estimator"),
        ({"advantage_estimator": "reinforce_pp", "critic_epochs": 2}, "reinforce_pp has no critic; drop it"),
        ({"kl_target": 6.0, "kl_penalty_weight": 0.0}, "pass --kl_penalty_weight above 0"),
    ],
)
def test_flags_that_do_not_fit(flags, words):
    with pytest.raises(UserError) as error:
        ppo_config(**flags)
    assert words in str(error.value)
