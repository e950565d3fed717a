"""reward/loss.py against numbers worked by hand: s(x) = 1 / (1 + exp(-x)), so -log s(x) = log(1 + exp(-x))."""

import math

import pytest
import torch

from reward.loss import ranking_hits, ranking_loss, simcse_losses


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_ranking_loss_is_the_mean_of_log_one_plus_exp_of_minus_the_difference():
    loss = ranking_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert loss.item() == pytest.approx((softplus(-1) + softplus(2)) / 2, abs=1e-6)


def test_equal_scores_cost_log_two():
    assert ranking_loss(torch.tensor([3.0]), torch.tensor([3.0])).item() == pytest.approx(0.693147, abs=1e-6)


def test_a_margin_is_taken_off_the_difference_pair_by_pair():
    loss = ranking_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]), margin=torch.tensor([1.0, -1.0]))
    assert loss.item() == pytest.approx((softplus(0) + softplus(-3)) / 2, abs=1e-6)


def test_smoothing_mixes_in_the_opposite_label():
    loss = ranking_loss(torch.tensor([2.0]), torch.tensor([0.0]), label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * softplus(-2) + 0.1 * softplus(2), abs=1e-6)


def test_smoothed_loss_is_least_where_the_sigmoid_is_one_minus_smoothing():
    difference = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    ranking_loss(difference, torch.zeros(1), label_smoothing=0.1).backward()
    assert difference.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_bf16_scores_a_thousand_apart_give_a_finite_float32_loss_and_gradient():
    rejected = torch.tensor([1000.0], dtype=torch.bfloat16, requires_grad=True)
    loss = ranking_loss(torch.zeros(1, dtype=torch.bfloat16), rejected)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1000.0)
    assert rejected.grad.item() == pytest.approx(1.0)


def test_the_gradient_is_minus_the_probability_of_being_wrong():
    chosen = torch.tensor([0.5], requires_grad=True)
    ranking_loss(chosen, torch.zeros(1)).backward()
    assert chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(0.5)), abs=1e-6)


def test_a_tie_counts_half():
    accuracy = ranking_hits(torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 4.0])).mean()
    assert accuracy.item() == 0.625  # (1 + 0 + 1/2 + 1) / 4


def test_smoothing_and_margin_together():
    loss = ranking_loss(torch.tensor([2.0]), torch.tensor([0.0]), margin=0.5, label_smoothing=0.25)
    assert loss.item() == pytest.approx(0.75 * softplus(-1.5) + 0.25 * softplus(1.5), abs=1e-6)


def test_simcse_of_orthogonal_pairs_is_the_share_of_one_among_equals():
    """cos is 1 for a pair with itself and 0 with the other, whatever the lengths: -log(e^(1/t) / (e^(1/t) + 1))."""
    first, second = torch.tensor([[3.0, 0.0], [0.0, 0.1]]), torch.tensor([[1.0, 0.0], [0.0, 7.0]])
    assert simcse_losses(first, second, 1.0).tolist() == pytest.approx([softplus(-1)] * 2, abs=1e-6)
    assert simcse_losses(first, second, 0.05).tolist() == pytest.approx([softplus(-20)] * 2, abs=1e-6)


def test_simcse_tells_first_views_from_second_ones():
    """Rows are first views: cosines [[1, 0.6], [0, 0.8]] at t = 1."""
    first, second = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    expected = [math.log(math.exp(1) + math.exp(0.6)) - 1, math.log(1 + math.exp(0.8)) - 0.8]
    assert simcse_losses(first, second, 1.0).tolist() == pytest.approx(expected, abs=1e-6)


def test_simcse_of_a_single_pair_and_of_no_difference_at_all():
    assert simcse_losses(torch.ones(1, 4), -torch.ones(1, 4), 0.05).tolist() == [0.0]
    zero = torch.zeros(3, 4, requires_grad=True)
    losses = simcse_losses(zero, torch.ones(3, 4), 0.05)
    assert losses.tolist() == pytest.approx([math.log(3)] * 3)
    losses.sum().backward()
    assert zero.grad.abs().max() < 1e5
