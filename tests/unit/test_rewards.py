"""From scores to token rewards, worked by hand."""

import pytest
import torch

from ppo.rewards import shape_scores, token_rewards
from utils.moments import RunningMoments

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


def test_single_token_response_carries_score_and_kl():
    rewards = token_rewards(torch.tensor([2.0]), torch.tensor([[7.0, 1.0]]), torch.tensor([[False, True]]), 0.5)
    assert rewards.tolist() == [[0.0, 1.5]]


def test_nan_outside_the_response_is_not_read():
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
def test_shaping(center, scale, clip, expected):
    # 1, 3, 5: mean 3, sample deviation 2
    shaped = shape_scores(torch.tensor([1.0, 3.0, 5.0]), moments_of(1, 3, 5), center, scale, clip, NO_PENALTY)
    torch.testing.assert_close(shaped, torch.tensor(expected))


def test_penalty_for_a_missing_end_comes_after_the_clipping():
    penalty = torch.tensor([0.0, -1.0, -1.0])
    shaped = shape_scores(torch.tensor([9.0, 9.0, -9.0]), RunningMoments(), False, False, 0.3, penalty)
    torch.testing.assert_close(shaped, torch.tensor([0.3, -0.7, -1.3]))


def test_one_score_ever_seen_is_centred_and_not_divided_by_nothing():
    shaped = shape_scores(torch.tensor([7.0]), moments_of(7.0), True, True, 0.0, torch.zeros(1))
    assert shaped.tolist() == [0.0]
