"""reward/loss.py, reward/metrics.py and reward/win_rate.py by hand: -log sigmoid(x) = log(1 + exp(-x))."""

import math

import pytest
import torch

from reward.batches import Comparison
from reward.evaluation.report import evaluation_report, model_report, render
from reward.loss import ranking_hits, ranking_loss, simcse_losses
from reward.metrics import (
    LARGER_IS_BETTER,
    ScoredItems,
    accuracy,
    accuracy_interval,
    agreement,
    calibration,
    calibration_error,
    evaluation_metrics,
    mean_best_score,
)
from reward.win_rate import count_outcomes, wilson_interval
from reward.win_rate import render as render_outcomes


def item(lengths: tuple[int, ...] = (3, 3), pairs=((0, 1),), subset: str = "all") -> Comparison:
    """A comparison of answers of these lengths behind one prompt token."""
    return Comparison([[1] + [5] * n for n in lengths], 1, list(pairs), [0.0] * len(pairs), subset, "")


def pairs(*differences: float, subsets: str = "") -> ScoredItems:
    """Pairs in which the better answer scores this much more than the worse, which scores 1."""
    names = subsets or "a" * len(differences)
    scores = [x for difference in differences for x in (1 + difference, 1.0)]
    return ScoredItems([item(subset=name) for name in names], torch.tensor(scores))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_ties_count_half_and_every_prompt_counts_once():
    ranked = item((3, 3, 3), ((0, 1), (0, 2), (1, 2)))
    scored = ScoredItems([item(), ranked], torch.tensor([2.0, 1.0, 3.0, 3.0, 5.0]))
    # The pair is right. Of the ranked three: a tie, wrong, wrong. Mean of 1 and (1/2 + 0 + 0) / 3.
    assert accuracy(scored) == pytest.approx((1 + 1 / 6) / 2)
    turned = ScoredItems([item(pairs=((1, 0),)), ranked], scored.scores)
    assert (mean_best_score(scored), mean_best_score(turned)) == pytest.approx(((2 + 3) / 2, (1 + 3) / 2))


def test_an_interval_counts_prompts_and_not_pairs():
    """81 of 263 right: 0.255 to 0.366 (Newcombe 1998, table I, method 3), whether 263 pairs or as many ranked lists."""
    hits = [1.0] * 81 + [-1.0] * 182
    assert accuracy_interval(pairs(*hits)) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    ranked = item((3, 3, 3), ((0, 1), (0, 2)))
    scores = torch.tensor([x for hit in hits for x in (hit, 0.0, 0.0)])
    assert accuracy_interval(ScoredItems([ranked] * 263, scores)) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_calibration_compares_predicted_with_observed_in_bins():
    """Four pairs predicted at 0.78, three right; two at 0.97, one right. ECE (4 x 0.03 + 2 x 0.47) / 6."""
    scored = pairs(*[logit(0.78)] * 3, -logit(0.78), logit(0.97), -logit(0.97))
    low, high = calibration(scored)
    assert (low.low, low.high, low.count) == pytest.approx((0.75, 0.8, 4))
    assert (low.predicted, low.observed) == pytest.approx((0.78, 0.75))
    assert (high.low, high.high, high.count) == pytest.approx((0.95, 1.0, 2))
    assert (high.predicted, high.observed) == pytest.approx((0.97, 0.5))
    assert calibration_error([low, high]) == pytest.approx((4 * 0.03 + 2 * 0.47) / 6)


def test_metrics_of_an_evaluation_with_subsets():
    metrics = evaluation_metrics(pairs(2.0, -1.0, 0.0, 3.0, subsets="aabb"))
    losses = [math.log1p(math.exp(-d)) for d in (2, -1, 0, 3)]
    assert metrics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    longer_is_worse = ScoredItems([item((4, 2)), item((3, 1))], torch.tensor([1.0, 2.0, 1.5, 2.5]))
    assert evaluation_metrics(longer_is_worse)["length_correlation"] == pytest.approx(-1.0)
    names = ("accuracy", "accuracy_a", "accuracy_b", "worst_subset_accuracy", "score_difference", "length_bias")
    assert [metrics[name] for name in names] == pytest.approx([2.5 / 4, 0.5, 0.75, 0.5, 1.0, 0.0])
    assert "accuracy_a" not in evaluation_metrics(pairs(1.0, 2.0))


def test_which_way_is_better():
    """One model ranks all pairs right and does not care for length; one gives the longer answer 9 more."""
    items = [item((4, 2)), item((2, 4), subset="other")]
    good, bad = (evaluation_metrics(ScoredItems(items, torch.tensor(x))) for x in ([9.0, 0, 9, 0], [9.0, 0, 0, 9]))
    assert {name: good[name] > bad[name] for name in LARGER_IS_BETTER} == LARGER_IS_BETTER


def test_agreement_of_three_models():
    """Pair 1: all prefer the better answer. Pair 2: one against two. Pair 3: one sees a tie."""
    models = [pairs(1.0, 1.0, 1.0), pairs(2.0, 2.0, 0.0), pairs(3.0, -6.0, 2.0)]
    found = agreement(models)
    assert found["pairwise"] == pytest.approx((1 + 1 / 3 + (0.5 + 1 + 0.5) / 3) / 3)
    assert found["unanimous"] == pytest.approx(1 / 3)
    deviations = [math.sqrt(2 / 3), math.sqrt((2**2 + 3**2 + 5**2) / 3), math.sqrt(2 / 3)]  # around 2, -1, 1
    assert found["strength_std"] == pytest.approx(sum(deviations) / 3, rel=1e-6)
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_the_report_of_a_model_and_of_two():
    """Differences 0, 1, 2, 3 and -4; in the last one the longer answer is better and the shorter preferred."""
    scored = pairs(0.0, 1.0, 2.0, 3.0, subsets="aabb")
    items, scores = [*scored.items, item((4, 2), subset="b")], [*scored.scores.tolist(), 1.0, 5.0]
    scored = ScoredItems(items, torch.tensor(scores))
    report = model_report(scored, {})
    quantiles = {"0.05": -3.2, "0.25": 0.0, "0.5": 1.0, "0.75": 2.0, "0.95": 2.8}
    assert report["score_difference_quantiles"] == pytest.approx(quantiles)
    assert report["score_difference_std"] == pytest.approx(math.sqrt(30 / 5 - 0.4**2))
    assert report["longer_is_better"] == pytest.approx((4 * 0.5 + 1) / 5)
    assert report["longer_is_preferred"] == pytest.approx(4 * 0.5 / 5)
    expected = {"prompts": 2, "accuracy": 0.75, "accuracy_interval": accuracy_interval(pairs(0, 1))}
    assert report["subsets"]["a"] == expected
    assert sum(b["count"] for b in report["calibration"]) == pytest.approx(5)
    both = evaluation_report({"one": scored, "two": scored}, "x.jsonl")
    assert (both["prompts"], both["pairs"], both["ensemble"]["unanimous"]) == (5, 5, 1.0)
    assert both["ensemble"]["accuracy_interval"] == pytest.approx(accuracy_interval(scored))
    low, high = accuracy_interval(pairs(0.0, 1.0))
    assert f"    a                 0.750 [{low:.3f}, {high:.3f}]  of 2\n" in render(both)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("chosen", "rejected", "options", "expected"),
    [
        ([1.0, 0.0], [0.0, 2.0], {}, (softplus(-1) + softplus(2)) / 2),
        ([1.0, 2.0], [0.0, 0.0], {"margin": torch.tensor([1.0, -1.0])}, (softplus(0) + softplus(-3)) / 2),
        ([2.0], [0.0], {"margin": 0.5, "label_smoothing": 0.25}, 0.75 * softplus(-1.5) + 0.25 * softplus(1.5)),
    ],
    ids=["mean", "margins", "both"],
)
def test_ranking_loss_by_hand(chosen, rejected, options, expected):
    assert ranking_loss(torch.tensor(chosen), torch.tensor(rejected), **options).item() == pytest.approx(expected)


def test_large_differences_in_bf16_are_finite():
    rejected = torch.tensor([1000.0], dtype=torch.bfloat16, requires_grad=True)
    loss = ranking_loss(torch.zeros(1, dtype=torch.bfloat16), rejected)
    loss.backward()
    assert (loss.dtype, loss.item(), rejected.grad.item()) == (torch.float32, 1000.0, 1.0)


def test_a_tie_counts_half():
    hits = ranking_hits(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert hits.tolist() == [1, 0, 0.5]


def test_simcse_by_hand():
    """Cosines of two orthogonal pairs, independent of lengths; [[1, 0.6], [0, 0.8]], rows are first views; one pair."""
    first, second = torch.tensor([[3.0, 0.0], [0.0, 0.1]]), torch.tensor([[1.0, 0.0], [0.0, 7.0]])
    assert simcse_losses(first, second, 0.05).tolist() == pytest.approx([softplus(-20)] * 2, abs=1e-6)
    second = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    expected = [math.log(math.exp(1) + math.exp(0.6)) - 1, math.log(1 + math.exp(0.8)) - 0.8]
    assert simcse_losses(first, second, 1.0).tolist() == pytest.approx(expected, abs=1e-6)
    assert simcse_losses(torch.ones(1, 4), -torch.ones(1, 4), 0.05).tolist() == [0.0]


def test_the_gradient_of_simcse_at_zero_features_is_finite():
    zero = torch.zeros(3, 4, requires_grad=True)
    simcse_losses(zero, torch.ones(3, 4), 0.05).sum().backward()
    assert zero.grad.abs().max() < 1e5


def test_outcomes_and_their_bar():
    differences = [0.5, 0.1, 0.0, -0.1, -0.1001, 3.0]
    assert count_outcomes(differences, 0.1) == {"win": 2, "tie": 3, "lose": 1}
    counts = count_outcomes(differences, 0.0)
    assert counts == {"win": 3, "tie": 1, "lose": 2}
    *lines, bar = render_outcomes(
        {name: wilson_interval(count, 6) for name, count in counts.items()}, counts, 12
    ).splitlines()
    assert bar == "█" * 6 + "▒" * 2 + "░" * 4
    assert [line.split()[:3] for line in lines] == [["win", "3", "50.0"], ["tie", "1", "16.7"], ["lose", "2", "33.3"]]


def test_wilson_interval():
    """0.7 of 10: table in Brown, Cai, DasGupta 2001. For a share of 0 or 1, one end is z² / (n + z²)."""
    assert wilson_interval(7, 10) == pytest.approx((0.7, 0.3968, 0.8922), abs=1e-4)
    z = 1.959964
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.0, z**2 / (10 + z**2)), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((1.0, 10 / (10 + z**2), 1.0), abs=1e-6)
