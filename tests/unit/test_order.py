"""The order of a run: epochs are permutations, and it resumes from the position alone."""

import pytest

from data.order import order


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
