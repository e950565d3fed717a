"""Shares of win, tie and lose, and their intervals, by hand."""

import math

import pytest

from reward.win_rate import count_outcomes, render, wilson_interval


def test_outcomes_by_hand():
    differences = [0.5, 0.1, 0.0, -0.1, -0.1001, 3.0]
    assert count_outcomes(differences, 0.0) == {"win": 3, "tie": 1, "lose": 2}
    assert count_outcomes(differences, 0.1) == {"win": 2, "tie": 3, "lose": 1}


def test_wilsons_interval_by_hand():
    z = 1.959964
    share, low, high = wilson_interval(7, 10)
    centre = (0.7 + z**2 / 20) / (1 + z**2 / 10)
    half = z * math.sqrt(0.7 * 0.3 / 10 + z**2 / 400) / (1 + z**2 / 10)
    assert (share, low, high) == pytest.approx((0.7, centre - half, centre + half), abs=1e-6)
    assert (low, high) == pytest.approx((0.3968, 0.8922), abs=1e-4)  # the table in Brown, Cai, DasGupta 2001
    # At the ends z²/(n + z²) is left.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.0, z**2 / (10 + z**2)), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((1.0, 10 / (10 + z**2), 1.0), abs=1e-6)


def test_the_bar_has_the_shares():
    counts = {"win": 3, "tie": 1, "lose": 2}
    *lines, bar = render({name: wilson_interval(count, 6) for name, count in counts.items()}, counts, 12).splitlines()
    assert bar == "█" * 6 + "▒" * 2 + "░" * 4
    assert [line.split()[:3] for line in lines] == [["win", "3", "50.0"], ["tie", "1", "16.7"], ["lose", "2", "33.3"]]
