"""reward/metrics.py against numbers worked by hand."""

import math

import pytest
import torch

from reward.batches import Comparison
from reward.metrics import (
    Scored,
    accuracy,
    accuracy_interval,
    agreement,
    calibration,
    calibration_error,
    correlation,
    held_out_metrics,
    length_preference,
    mean_best,
)


def item(lengths: tuple[int, ...] = (3, 3), pairs=((0, 1),), subset: str = "all") -> Comparison:
    """A comparison of answers of these lengths behind one prompt token."""
    return Comparison([[1] + [5] * n for n in lengths], 1, list(pairs), [0.0] * len(pairs), subset, "")


def pairs(*differences: float, subsets: str = "") -> Scored:
    """Pairs in which the better answer scores this much more than the worse, which scores 1."""
    names = subsets or "a" * len(differences)
    scores = [x for difference in differences for x in (1 + difference, 1.0)]
    return Scored([item(subset=name) for name in names], torch.tensor(scores))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_ties_count_half_and_every_prompt_counts_once():
    ranked = item((3, 3, 3), ((0, 1), (0, 2), (1, 2)))
    scored = Scored([item(), ranked], torch.tensor([2.0, 1.0, 3.0, 3.0, 5.0]))
    # The pair is right. Of the ranked three: a tie, wrong, wrong. Mean of 1 and (1/2 + 0 + 0) / 3.
    assert accuracy(scored) == pytest.approx((1 + 1 / 6) / 2)
    assert mean_best(scored) == pytest.approx((2 + 3) / 2)


def test_an_interval_counts_prompts_and_not_pairs():
    """81 of 263 right: 0.255 to 0.366 (Newcombe 1998, table I, method 3), whether 263 pairs or as many ranked lists."""
    hits = [1.0] * 81 + [-1.0] * 182
    assert accuracy_interval(pairs(*hits)) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    ranked = item((3, 3, 3), ((0, 1), (0, 2)))
    scores = torch.tensor([x for hit in hits for x in (hit, 0.0, 0.0)])
    assert accuracy_interval(Scored([ranked] * 263, scores)) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_calibration_compares_predicted_with_observed_in_bins():
    """Four pairs predicted at 0.78, three right; two at 0.97, one right. ECE (4 x 0.03 + 2 x 0.47) / 6."""
    scored = pairs(*[logit(0.78)] * 3, -logit(0.78), logit(0.97), -logit(0.97))
    low, high = calibration(scored)
    assert (low.low, low.high, low.count) == pytest.approx((0.75, 0.8, 4))
    assert (low.predicted, low.observed) == pytest.approx((0.78, 0.75))
    assert (high.low, high.high, high.count) == pytest.approx((0.95, 1.0, 2))
    assert (high.predicted, high.observed) == pytest.approx((0.97, 0.5))
    assert calibration_error([low, high]) == pytest.approx((4 * 0.03 + 2 * 0.47) / 6)


def test_calibration_of_ties_and_of_certainty():
    tie, certain = calibration(pairs(0.0, 1000.0))
    assert (tie.predicted, tie.observed) == (0.5, 0.5)
    assert (certain.low, certain.predicted, certain.observed) == pytest.approx((0.95, 1.0, 1.0))


def test_correlation_of_a_line_of_noise_and_of_nothing():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert correlation(x, -2 * x + 7) == pytest.approx(-1.0)
    assert correlation(x, torch.tensor([1.0, 3.0, 2.0])) == pytest.approx(0.5)  # (1 + 0 + 0) / 2
    assert correlation(x, torch.ones(3)) == 0.0


def test_how_often_the_longer_answer_is_better_and_how_often_it_is_preferred():
    """Longer better and preferred; longer worse but preferred; a tie of scores; equal lengths."""
    scored = Scored(
        [item((5, 2)), item((2, 5)), item((5, 2)), item((4, 4))], torch.tensor([2.0, 1.0, 1.0, 2.0, 3.0, 3.0, 9.0, 1.0])
    )
    assert length_preference(scored) == pytest.approx(((1 + 0 + 1 + 0.5) / 4, (1 + 1 + 0.5 + 0.5) / 4))


def test_metrics_of_an_evaluation_with_subsets():
    metrics = held_out_metrics(pairs(2.0, -1.0, 0.0, 3.0, subsets="aabb"))
    losses = [math.log1p(math.exp(-d)) for d in (2, -1, 0, 3)]
    assert metrics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(2.5 / 4)
    assert metrics["accuracy_a"] == pytest.approx(0.5)
    assert metrics["accuracy_b"] == pytest.approx(0.75)
    assert metrics["worst_subset_accuracy"] == pytest.approx(0.5)
    assert metrics["score_difference"] == pytest.approx(1.0)
    assert metrics["length_bias"] == 0.0  # all answers are equally long
    assert "accuracy_a" not in held_out_metrics(pairs(1.0, 2.0))


def test_length_bias_is_the_size_of_the_correlation():
    metrics = held_out_metrics(Scored([item((4, 2)), item((3, 1))], torch.tensor([1.0, 2.0, 1.5, 2.5])))
    assert metrics["length_correlation"] == pytest.approx(-1.0)
    assert metrics["length_bias"] == pytest.approx(1.0)


def test_agreement_of_three_models():
    """Pair 1: all prefer the better answer. Pair 2: one against two. Pair 3: one sees a tie."""
    models = [pairs(1.0, 1.0, 1.0), pairs(2.0, 2.0, 0.0), pairs(3.0, -6.0, 2.0)]
    found = agreement(models)
    assert found["pairwise"] == pytest.approx((1 + 1 / 3 + (0.5 + 1 + 0.5) / 3) / 3)
    assert found["unanimous"] == pytest.approx(1 / 3)
    deviations = [math.sqrt(2 / 3), math.sqrt((2**2 + 3**2 + 5**2) / 3), math.sqrt(2 / 3)]  # around 2, -1, 1
    assert found["strength_std"] == pytest.approx(sum(deviations) / 3, rel=1e-6)
    assert found["accuracy"] == pytest.approx(2 / 3)
