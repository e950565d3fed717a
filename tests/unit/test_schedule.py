"""utils/schedule.py, step by step, against fractions worked by hand."""

import math

import pytest

from utils.schedule import SCHEDULES, lr_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_linearly_from_a_first_step_that_moves(schedule):
    assert [lr_factor(step, 4, 100, schedule) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_inverse_square_root():
    # sqrt(warmup / (step + 1)): step 15 with 4 steps of warm-up is sqrt(4 / 16).
    assert lr_factor(15, 4, 100, "inverse_sqrt") == pytest.approx(0.5)
    assert lr_factor(4, 4, 100, "inverse_sqrt") == pytest.approx(math.sqrt(4 / 5))


def test_linear_ends_at_a_tenth():
    # 10 steps after 2 of warm-up: half-way (step 6) is (1 + 0.1) / 2.
    assert lr_factor(6, 2, 12, "linear") == pytest.approx(0.55)
    assert lr_factor(11, 2, 12, "linear") == pytest.approx(0.1)


def test_cosine_ends_at_a_tenth():
    # A quarter of the way: 0.1 + 0.9 * (1 + cos(45 degrees)) / 2.
    assert lr_factor(3, 2, 10, "cosine") == pytest.approx(0.1 + 0.45 * (1 + math.sqrt(0.5)))
    assert lr_factor(5, 2, 10, "cosine") == pytest.approx(0.55)
    assert lr_factor(9, 2, 10, "cosine") == pytest.approx(0.1)


def test_beyond_the_end_the_floor_holds():
    assert lr_factor(50, 2, 10, "cosine") == pytest.approx(0.1)
    assert lr_factor(50, 2, 10, "linear") == pytest.approx(0.1)


def test_constant_stays():
    assert lr_factor(999, 1, 1000, "constant") == 1.0


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "cosine", "linear", "constant"])
def test_without_warm_up_the_first_step_has_the_peak(schedule):
    assert lr_factor(0, 0, 10, schedule) == 1.0


def test_a_run_that_is_all_warm_up_ends_at_the_peak():
    assert lr_factor(2, 3, 3, "cosine") == 1.0


def test_a_negative_warm_up_and_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="--warmup_steps -1"):
        lr_factor(0, -1, 10, "cosine")
    with pytest.raises(ValueError, match="--lr_schedule cosin"):
        lr_factor(0, 1, 10, "cosin")
