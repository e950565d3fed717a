"""The order of a run: epochs are permutations, and it resumes from the position alone."""

from collections import Counter

import pytest

from data.order import mixture, order


def test_every_epoch_is_a_fresh_permutation():
    run = order(0, 30, 10, seed=0)
    epochs = [run[k : k + 10] for k in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(10))


def test_it_resumes_anywhere():
    run = order(0, 100, 7, seed=3)
    for start in (0, 1, 6, 7, 50):
        assert order(start, 100 - start, 7, seed=3) == run[start:]


def test_seeds_differ_and_repeat():
    assert order(0, 50, 50, seed=1) == order(0, 50, 50, seed=1)
    assert order(0, 50, 50, seed=1) != order(0, 50, 50, seed=2)
    # Not one long sequence that seeds enter at different places:
    assert order(50, 50, 50, seed=1) != order(0, 50, 50, seed=2)


def test_more_than_there_is_and_nothing_at_all():
    assert order(0, 5, 1, seed=0) == [0] * 5
    assert order(3, 0, 4, seed=0) == []
    with pytest.raises(ValueError, match="no items"):
        order(0, 1, 0, seed=0)
    with pytest.raises(ValueError, match="negative"):
        order(-1, 1, 5, seed=0)


def test_sets_get_their_share_whatever_their_size():
    """Weights 2 and 1 of 3000 items: 667 + 333 in each thousand, by the running sums 666.7 and 1000."""
    run = mixture(0, 3000, [7, 5000], [2, 1], seed=0)
    for start in (0, 1000, 2000):
        assert Counter(k for k, _ in run[start : start + 1000]) == {0: 667, 1: 333}
    assert 55 <= sum(k == 0 for k, _ in run[:100]) <= 78  # mixed, not one after the other


def test_each_set_of_a_mixture_has_its_own_epochs():
    run = mixture(0, 3000, [10, 700], [0.6, 0.4], seed=4)
    small, large = ([i for k, i in run if k == chosen] for chosen in (0, 1))
    assert [sorted(small[start : start + 10]) for start in range(0, 1800, 10)] == [list(range(10))] * 180
    assert len(set(large[:700])) == 700
    assert small[:10] != small[10:20]


def test_a_mixture_resumes_anywhere_and_depends_on_the_seed():
    run = mixture(0, 2500, [3, 40, 9], [1, 2, 0.5], seed=3)
    for start in (1, 999, 1000, 1001, 2300):
        assert mixture(start, 2500 - start, [3, 40, 9], [1, 2, 0.5], seed=3) == run[start:]
    assert mixture(0, 100, [3, 40, 9], [1, 2, 0.5], seed=2) != run[:100]


def test_one_set_of_any_weight_is_the_plain_order():
    assert [i for _, i in mixture(0, 50, [7], [0.3], seed=5)] == order(0, 50, 7, seed=5)


def test_shares_that_would_never_come_up():
    with pytest.raises(ValueError, match="below 1 in 1000"):
        mixture(0, 1, [5, 5], [1, 0.0001], seed=0)
