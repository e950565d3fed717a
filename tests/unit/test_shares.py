"""data/batching/micro_batch_plan.py and reward/batches.py: who does what, and how many pairs make a step."""

from itertools import islice

import pytest

from data.batching.micro_batch_plan import rank_plan
from reward.batches import dynamic_batches

LENGTHS = [5, 9, 2, 7, 7, 3, 8]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_item_once_and_as_many_micro_batches_on_every_rank(num_ranks):
    plans = [rank_plan(LENGTHS, 10, num_ranks, rank) for rank in range(num_ranks)]
    assert len({len(plan) for plan in plans}) == 1
    real = sorted(i for plan in plans for part, weight in plan if weight for i in part)
    assert real == list(range(len(LENGTHS)))


def test_a_rank_with_nothing_to_do_repeats_the_shortest_item_without_weight():
    assert [rank_plan([4, 2], 10, 3, rank) for rank in range(3)] == [[([0], 1.0)], [([1], 1.0)], [([1], 0.0)]]


def test_ranks_get_equally_many_tokens():
    plans = [rank_plan([9, 1, 8, 2], 100, 2, rank) for rank in range(2)]
    assert [sorted(i for part, _ in plan for i in part) for plan in plans] == [[0, 1], [2, 3]]


def test_one_length_gives_batch_size_pairs():
    assert all(len(batch) == 8 for batch in islice(dynamic_batches([10] * 50, 8, seed=0), 20))


def test_long_pairs_make_small_batches_and_short_ones_large():
    lengths = [10] * 40 + [100] * 40  # mean 55, so 16 pairs are 880 tokens
    for batch in islice(dynamic_batches(lengths, 16, seed=1), 30):
        assert len(batch) == 4 or sum(lengths[i] for i in batch) <= 880
        assert sum(lengths[i] for i in batch) > 880 - 100


def test_no_fewer_than_four_pairs_and_no_more_than_the_limit():
    lengths = [1000] + [1] * 399
    sizes = {len(batch) for batch in islice(dynamic_batches(lengths, 120, seed=0), 12)}
    assert max(sizes) == 128
    sizes = {len(batch) for batch in islice(dynamic_batches([500, 1, 1, 1, 1, 1], 4, seed=0), 12)}
    assert min(sizes) == 4


def test_an_epoch_has_every_pair_once_and_the_seed_decides_the_order():
    def first_epoch(seed: int) -> list[int]:
        return [i for batch in islice(dynamic_batches([10] * 24, 8, seed), 3) for i in batch]

    assert sorted(first_epoch(0)) == list(range(24))
    assert first_epoch(0) == first_epoch(0) != first_epoch(1)
