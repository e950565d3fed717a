"""Masked tensor functions and running moments by hand. The numbers of the released code: tests/golden."""

import json
import math

import numpy
import pytest
import torch

from utils.moments import RunningMoments
from utils.tensors import at_tokens, before_tokens, last_index, masked_mean, position_ids, whiten

NAN = float("nan")


def test_masked_mean_reads_the_mask_only():
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_mean(torch.tensor([[1.0, NAN], [2.0, 6.0]]), mask).item() == 3.0
    assert masked_mean(torch.tensor([NAN]), torch.tensor([False])).item() == 0.0


def test_whiten_by_hand():
    # 1, 3, 5: mean 3, population variance 8/3
    mask = torch.tensor([[True, False, True], [False, True, False]])
    whitened = whiten(torch.tensor([[1.0, NAN, 3.0], [9.0, 5.0, 9.0]]), mask)
    step = 2 / math.sqrt(8 / 3)
    torch.testing.assert_close(whitened, torch.tensor([[-step, 0.0, 0.0], [0.0, step, 0.0]]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("x", [[[4.0, 0.0]], [[4.0, 4.0]]])
def test_whiten_one_token_or_equal_ones_gives_zero(x):
    x = torch.tensor(x)
    assert whiten(x, x > 0).tolist() == [[0.0, 0.0]]
    assert whiten(x, torch.zeros_like(x).bool()).tolist() == [[0.0, 0.0]]


def test_whiten_over_two_ranks_equals_one_batch():
    mine, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[7.0, -3.0]])
    both = torch.cat([mine, other])
    mean = both.mean()
    answers = iter([torch.stack([both.sum(), torch.tensor(4.0)]), (both - mean).square().sum()])
    whitened = whiten(mine, torch.ones(1, 2).bool(), sum_ranks=lambda x: next(answers))
    torch.testing.assert_close(whitened, whiten(both, torch.ones(2, 2).bool())[:1])


def test_before_and_at_tokens_are_each_others_places():
    mask = torch.tensor([[False, False, True, True], [False, True, False, False]])
    states = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    rows = before_tokens(states, mask)
    assert rows.tolist() == [11, 12, 20]
    assert at_tokens(rows, mask).tolist() == [[0, 0, 11, 12], [0, 20, 0, 0]]
    nothing = torch.zeros_like(mask)
    assert at_tokens(before_tokens(states, nothing), nothing).tolist() == [[0] * 4] * 2


def test_position_ids_with_padding_anywhere():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 1, 1]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]


def test_last_index():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert last_index(mask).tolist() == [2, 0, 3, 0]


def moments_of(*batches: list[float], sum_ranks=lambda x: x) -> RunningMoments:
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch), sum_ranks)
    return moments


@pytest.mark.parametrize(
    ("batches", "mean", "std"),
    [
        ([], 0.0, 1.0),  # without a deviation it is 1, whatever the rounding of equal numbers
        ([[7.0]], 7.0, 1.0),
        ([[7.0, 7.0], [7.0]], 7.0, 1.0),
        ([[0.1] * 24] * 3, 0.1, 1.0),
        ([[1e4 / 3] * 128] * 3, 1e4 / 3, 1.0),
        ([[0.1, 0.10001] * 64], 0.100005, 5.02e-6),
        ([[1e4 + 1, 1e4 + 2], [1e4 + 3]], 1e4 + 2, 1.0),
    ],
)
def test_moments_with_little_or_no_deviation(batches, mean, std):
    moments = moments_of(*batches)
    assert moments.mean == pytest.approx(mean, rel=1e-6)
    assert moments.std == pytest.approx(std, rel=0.01 if std < 1 else 1e-3)


def test_moments_sum_over_ranks():
    # Two ranks with the same two numbers: mean 2, squares 4 over n - 1 = 3.
    moments = moments_of([1.0, 3.0], sum_ranks=lambda x: 2 * x)
    assert (moments.count, moments.mean) == (4, 2.0)
    assert moments.std == pytest.approx((4 / 3) ** 0.5)


def test_moments_go_through_json():
    kept = moments_of([1.0, 2.0, 4.0])
    restored = RunningMoments()
    restored.load_state_dict(json.loads(json.dumps(kept.state_dict())))
    for moments in (kept, restored):
        moments.update(torch.tensor([8.0, -1.0]))
    assert restored.state_dict() == kept.state_dict()
    assert restored.std == pytest.approx(numpy.std([1, 2, 4, 8, -1], ddof=1))
