"""Running mean and deviation: against numpy's over everything at once, and the cases without a deviation."""

import json

import numpy
import pytest
import torch

from utils.moments import RunningMoments


def moments_of(*batches: list[float], sum_ranks=lambda x: x) -> RunningMoments:
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch), sum_ranks)
    return moments


def test_batches_of_any_size_equal_everything_at_once():
    numbers = numpy.random.default_rng(0).normal(5, 3, 57).tolist()
    moments = moments_of(numbers[:1], numbers[1:20], numbers[20:21], numbers[21:])
    assert moments.mean == pytest.approx(numpy.mean(numbers), rel=1e-5)
    assert moments.std == pytest.approx(numpy.std(numbers, ddof=1), rel=1e-5)
    assert moments.count == 57


def test_far_from_zero_the_deviation_survives_float32():
    assert moments_of([1e4 + 1, 1e4 + 2], [1e4 + 3]).std == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("batches", [[], [[7.0]], [[7.0, 7.0], [7.0]]])
def test_deviation_is_one_where_there_is_none(batches):
    moments = moments_of(*batches)
    assert moments.std == 1.0
    assert moments.mean == (7.0 if batches else 0.0)


@pytest.mark.parametrize("number", [0.1, -0.7, 1 / 3, 2.9, 1e4 / 3])
@pytest.mark.parametrize("size", [8, 24, 128])
def test_equal_numbers_have_none_whatever_their_rounding(number, size):
    for batches in ([[number] * size], [[number] * size] * 3):
        moments = moments_of(*batches)
        assert moments.std == 1.0
        assert moments.mean == pytest.approx(number, rel=1e-6)


def test_a_small_deviation_is_one():
    assert moments_of([0.1, 0.10001] * 64).std == pytest.approx(5.02e-6, rel=0.01)


def test_empty_batch_changes_nothing():
    moments = moments_of([1.0, 3.0])
    before = moments.state_dict()
    moments.update(torch.empty(0))
    assert moments.state_dict() == before


def test_ranks_are_summed():
    # Two ranks with the same two numbers: mean 2, squares 4 over n - 1 = 3.
    moments = moments_of([1.0, 3.0], sum_ranks=lambda x: 2 * x)
    assert (moments.count, moments.mean) == (4, 2.0)
    assert moments.std == pytest.approx((4 / 3) ** 0.5)


def test_state_goes_through_json_and_continues_identically():
    kept = moments_of([1.0, 2.0, 4.0])
    restored = RunningMoments()
    restored.load_state_dict(json.loads(json.dumps(kept.state_dict())))
    for moments in (kept, restored):
        moments.update(torch.tensor([8.0, -1.0]))
    assert restored.state_dict() == kept.state_dict()
    assert restored.std == pytest.approx(numpy.std([1, 2, 4, 8, -1], ddof=1))
