"""Statistics of verdicts, against numbers by hand."""

import math

import numpy
import pytest

from ppo.judge_statistics import (
    ELO,
    RIDGE,
    bradley_terry,
    interval,
    judged_pair,
    length_controlled,
    mean,
    outcomes,
    pair_scores,
    resampled,
)

NAN = math.nan
ONE = numpy.ones((2, 1))  # weights of one prompt


def verdicts(*rows) -> numpy.ndarray:
    return numpy.array(rows, dtype=float)


def test_both_orders_make_an_outcome():
    """Rows: (score of the first policy's answer, shown first; of the second's, shown first)."""
    rows = verdicts((0, 1), (1, 1), (1, 0), (0.5, 1), (0.5, 0), (0, 0.5), (NAN, 1), (NAN, NAN))
    same = numpy.array([False] * 7 + [True])
    assert outcomes(rows, same) == pytest.approx([1, 0.5, 0, 0.75, 0.25, 0.75, NAN, 0.5], nan_ok=True)


def test_a_pair_is_counted():
    rows = verdicts((0, 1), (0, 1), (1, 0), (1, 1), (0.5, 0.5), (1, NAN), (NAN, NAN))
    same = numpy.array([False] * 6 + [True])
    scores = {"reward": [2.0, -1.0, -1.0, 3.0, 1.0, 1.0, 0.0], "other": [NAN] * 7}
    result = judged_pair(rows, same, numpy.zeros(7), scores, resampled(7, 1))
    assert result["prompts"] == 6 and result["same_answers"] == 1
    assert result["counts"] == {"win": 2, "tie": 3, "lose": 1}
    assert result["win"][0] == pytest.approx(2 / 6)
    # Wilson by hand for 1 of 6: z² = 3.8415; (1/6 + z²/12 ± z √(5/36/6 + z²/144)) / (1 + z²/6)
    assert result["lose"] == pytest.approx([0.1667, 0.0301, 0.5635], abs=1e-4)
    assert result["win_rate"][0] == pytest.approx((2 + 3 / 2) / 6)
    assert result["first_place"][0] == pytest.approx((4 * 0.5 + 1) / 5)  # the fourth chose the first place twice
    assert result["orders_agree"][0] == pytest.approx(4 / 5)
    assert result["agreement"]["reward"]["prompts"] == 3  # of win, win, lose it agrees with the first and the last
    assert result["agreement"]["reward"]["share"][0] == pytest.approx(2 / 3)
    assert result["agreement"]["other"] == {"prompts": 0, "share": None}
    for name in ("win_rate", "first_place", "orders_agree", "length_controlled_win_rate"):
        assert result[name][1] <= result[name][0] <= result[name][2]
    nothing = judged_pair(verdicts((NAN, 1)), numpy.array([False]), numpy.zeros(1), {}, resampled(1, 1))
    assert nothing["prompts"] == 0 and "win_rate" not in nothing


def test_intervals_cover_the_truth():
    """Of 400 samples of 60 coins with p = 0.7, about 95 % of the intervals contain 0.7."""
    coins, weights = numpy.random.default_rng(5).random((400, 60)) < 0.7, resampled(60, 1)
    found = [interval(mean(row * 1.0, weights)) for row in coins]
    assert 0.92 < numpy.mean([low <= 0.7 <= high for _, low, high in found]) < 0.98
    assert interval(mean(numpy.array([NAN]), ONE)) is None


def test_length_control_by_hand():
    """Two lengths, so that the regression fits each group's rate: logit(3/4) = a + bt, logit(1/4) = a - bt."""
    outcome, lengths = verdicts(1, 1, 1, 0, 0, 0, 0, 1), numpy.array([10.0] * 4 + [-10.0] * 4)
    rate = length_controlled(outcome, lengths, numpy.ones((1, 8)))
    assert rate == pytest.approx(0.5, abs=1e-6)  # a = 0: what looks like wins is length
    outcome = verdicts(1, 1, 1, 0, 1, 1, 0, 0)  # logits ln 3 and 0: a = ln 3 / 2
    expected = 1 / (1 + math.exp(-math.log(3) / 2))
    assert length_controlled(outcome, lengths, numpy.ones((1, 8))) == pytest.approx(expected, abs=2e-3)  # the penalty
    weights = numpy.array([[1000.0] * 8])  # as eight thousand prompts
    assert length_controlled(outcome, lengths, weights) == pytest.approx(expected, abs=2e-6)


def test_length_control_without_a_difference_or_a_loss():
    outcome = verdicts(1, 1, 0.5, 0)
    assert length_controlled(outcome, numpy.zeros(4), numpy.ones((1, 4))) == pytest.approx(0.625, abs=2e-3)
    assert numpy.isnan(length_controlled(outcome, numpy.full(4, 7.0), numpy.ones((1, 4))))  # length, or quality
    [rate, nothing] = length_controlled(verdicts(1, NAN), numpy.zeros(2), verdicts((1, 1), (0, 2)))
    assert rate > 0.96 and numpy.isnan(nothing)  # a resample without a known verdict
    one = judged_pair(verdicts((0, 1)), numpy.array([False]), numpy.array([7.0]), {}, resampled(1, 1))
    assert one["length_controlled_win_rate"] is None and one["win_rate"] == [1, 1, 1]
    [rate] = length_controlled(numpy.ones(9), numpy.arange(9.0), numpy.ones((1, 9)))
    a = math.log(rate / (1 - rate))
    assert 0.97 < rate < 1
    # Where the slope in a is 0, with x = tanh(d / std): Σ (1 - p) = RIDGE a, and Σ (1 - p) x = RIDGE b.
    x, b = numpy.tanh(numpy.arange(9.0) / numpy.arange(9.0).std()), 0.0
    for _ in range(10_000):
        b += 0.5 * (((1 - 1 / (1 + numpy.exp(-a - b * x))) @ x) - RIDGE * b)
    assert (1 - 1 / (1 + numpy.exp(-a - b * x))).sum() == pytest.approx(RIDGE * a, abs=1e-6)


def test_bradley_terry_by_hand():
    """Strengths 9 : 3 : 1 give wins of 3 to 1 and 9 to 1, which is what is counted with half a win for each side."""
    count = 9
    scores = numpy.full((count, 3, 3), NAN)

    def play(i, j, wins, ties):
        for row in range(wins + ties):
            scores[row, i, j] = 1.0 if row < wins else 0.5
            scores[row, j, i] = 1 - scores[row, i, j]

    play(0, 1, 2, 1)  # 2.5 + 0.5 to 0.5 + 0.5: 3 to 1
    play(1, 2, 2, 1)
    play(0, 2, 8, 1)  # 8.5 + 0.5 to 0.5 + 0.5: 9 to 1
    ratings = bradley_terry(scores, resampled(count, 0))
    step = ELO * math.log(3)
    assert [rating[0] for rating in ratings] == pytest.approx([step, 0, -step], abs=1e-3)
    assert step == pytest.approx(190.85, abs=0.01)
    assert all(low <= estimate <= high for estimate, low, high in ratings)
    scores[:, 2], scores[:, :, 2] = NAN, NAN  # else it would be known to be average
    scores[:, 2, 2] = 0.5
    assert [rating is None for rating in bradley_terry(scores, resampled(count, 0))] == [False, False, True]


def test_scores_of_pairs():
    scores = pair_scores([[1.0, 2.0], [1.0, 3.0], [None, 1.0]])
    expected = [[[0.5, 0.5, NAN], [0.5, 0.5, NAN], [NAN] * 3], [[0.5, 0, 1], [1, 0.5, 1], [0, 0, 0.5]]]
    numpy.testing.assert_equal(scores, numpy.array(expected))
