"""reward/loss.py and reward/win_rate.py by hand: -log sigmoid(x) = log(1 + exp(-x))."""

import math

import pytest
import torch

from reward.loss import ranking_hits, ranking_loss, simcse_losses
from reward.win_rate import count_outcomes, render, wilson_interval


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
    *lines, bar = render({name: wilson_interval(count, 6) for name, count in counts.items()}, counts, 12).splitlines()
    assert bar == "█" * 6 + "▒" * 2 + "░" * 4
    assert [line.split()[:3] for line in lines] == [["win", "3", "50.0"], ["tie", "1", "16.7"], ["lose", "2", "33.3"]]


def test_wilson_interval():
    """0.7 of 10: table in Brown, Cai, DasGupta 2001. For a share of 0 or 1, one end is z² / (n + z²)."""
    assert wilson_interval(7, 10) == pytest.approx((0.7, 0.3968, 0.8922), abs=1e-4)
    z = 1.959964
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.0, z**2 / (10 + z**2)), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((1.0, 10 / (10 + z**2), 1.0), abs=1e-6)
