"""data/order.py and data/batching/: data order, padding, micro-batches, packing, splits over ranks, dynamic batches."""

import random
from collections import Counter
from itertools import chain, islice, pairwise

import pytest
import torch

from data.batching.collate import balance, micro_batches, pad
from data.batching.micro_batch_plan import rank_plan
from data.batching.packing import pack, restarting_positions
from data.encoded import Mixture
from data.order import mixture, order
from reward.batches import Comparison, dynamic_batches
from utils.tensors import position_ids


def test_epochs_are_permutations_that_depend_on_the_seed():
    run = order(0, 30, 10, seed=0)
    epochs = [run[k : k + 10] for k in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(10))
    assert order(0, 50, 50, seed=1) != order(0, 50, 50, seed=2)
    assert order(50, 50, 50, seed=1) != order(0, 50, 50, seed=2)  # not one sequence with different starts
    assert order(0, 5, 1, seed=0) == [0] * 5 and order(3, 0, 4, seed=0) == []


def test_order_resumes_anywhere():
    run, mixed = order(0, 100, 7, seed=3), mixture(0, 2500, [3, 40, 9], [1, 2, 0.5], seed=3)
    for start in (0, 1, 6, 7, 50):
        assert order(start, 100 - start, 7, seed=3) == run[start:]
    for start in (1, 999, 1000, 1001, 2300):
        assert mixture(start, 2500 - start, [3, 40, 9], [1, 2, 0.5], seed=3) == mixed[start:]
    assert mixture(0, 100, [3, 40, 9], [1, 2, 0.5], seed=2) != mixed[:100]


def test_shares_and_epochs_of_a_mixture():
    """Weights 2 and 1: 667 + 333 in each thousand, by the rounded running sums 666.7 and 1000."""
    run = mixture(0, 3000, [10, 700], [2, 1], seed=4)
    for start in (0, 1000, 2000):
        assert Counter(k for k, _ in run[start : start + 1000]) == {0: 667, 1: 333}
    assert 55 <= sum(k == 0 for k, _ in run[:100]) <= 78  # mixed, not one after the other
    small, large = ([i for k, i in run if k == chosen] for chosen in (0, 1))
    assert [sorted(small[start : start + 10]) for start in range(0, 2000, 10)] == [list(range(10))] * 200
    assert len(set(large[:700])) == 700 and small[:10] != small[10:20]
    assert [i for _, i in mixture(0, 50, [7], [0.3], seed=5)] == order(0, 50, 7, seed=5)
    with pytest.raises(ValueError, match="below 1/1000"):
        mixture(0, 1, [5, 5], [1, 0.0001], seed=0)


def test_pad_right_and_left():
    ids, mask = pad([[5, 6, 0], [0]], 0)
    assert ids.tolist() == [[5, 6, 0], [0, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]  # real tokens with the pad id count
    ids, mask = pad([[5, 6, 7], [8], []], 9, side="left")
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8], [9, 9, 9]]
    assert mask.tolist() == [[True, True, True], [False, False, True], [False] * 3]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_micro_batches_by_hand():
    # 5 and 4 make 2 × 5 = 10; a third row would make 15. 3, 2, 1 make 3 × 3 = 9. 12 exceeds the budget.
    assert micro_batches([3, 12, 5, 1, 4, 2], 10) == [[1], [2, 4], [0, 5, 3]]
    assert micro_batches([3, 5, 1, 1], 10, joined=True) == [[1, 0, 2, 3]]  # 10 real tokens
    assert micro_batches([], 10) == []
    # One more forward costs 64 tokens: 404 with 307 would waste 97, 182 with 180 and 136 wastes 48.
    lengths = [182, 307, 104, 109, 136, 234, 180, 404]
    assert micro_batches(lengths, 2048) == [[7], [1], [5], [0, 6, 4], [3, 2]]
    # With several ranks it costs 256: 404, 307 and 234 together waste 267.
    assert micro_batches(lengths, 2048, num_ranks=8) == [[7, 1, 5], [0, 6, 4, 3, 2]]


def test_micro_batches_are_the_cheapest_of_all_splits():
    rng = random.Random(2)
    for _ in range(30):
        lengths = sorted((rng.randint(1, 700) for _ in range(8)), reverse=True)
        costs = []
        for cuts in range(2**7):  # all splits of the sorted lengths
            starts = [0] + [i + 1 for i in range(7) if cuts >> i & 1] + [8]
            sizes = [(end - start, (end - start) * lengths[start]) for start, end in pairwise(starts)]
            if all(count == 1 or padded <= 600 for count, padded in sizes):
                costs.append(sum(padded + 64 for _, padded in sizes))
        batches = micro_batches(lengths, 600)
        assert sorted(chain(*batches)) == list(range(8))
        assert all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= 600 for batch in batches)
        assert sum(len(batch) * lengths[batch[0]] + 64 for batch in batches) == min(costs)


def test_balance_by_hand():
    # 8 to the first; 7, then 6 to the second (13); 5 to the first (13); the tie gives 4 to the first, 3 to the second.
    assert balance([3, 4, 5, 6, 7, 8], 2) == [[1, 2, 5], [0, 3, 4]]
    assert balance([4, 9], 3) == [[1], [0], []]
    # 9 and 8 go to a rank each; the first 1 to that with 8, which is then full; the other to that with 9.
    assert balance([9, 8, 1, 1], 2, most=2) == [[0, 3], [1, 2]]


def test_pack_by_hand():
    assert pack([7, 6, 5, 4, 3], 10) == [[0, 4], [1, 3], [2]]  # 4 goes to the 6 with 4 left, 3 to the 7
    assert pack([3, 12, 3, 3], 6) == [[1], [0, 2], [3]]


def test_packed_rows_are_nearly_full():
    """Full windows cut into pieces, for which the optimum is 40 rows."""
    for seed in range(5):
        rng, lengths = random.Random(seed), []
        for _ in range(40):
            cuts = sorted(rng.sample(range(1, 512), rng.randint(0, 6)))
            lengths += [stop - start for start, stop in pairwise([0, *cuts, 512])]
        rng.shuffle(lengths)
        rows = pack(lengths, 512)
        assert sorted(chain(*rows)) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in row) for row in rows) <= 512 and 40 / len(rows) >= 0.95


def test_restarting_positions():
    assert restarting_positions([2, 3, 1], 9).tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert torch.equal(restarting_positions([4], 7), position_ids(torch.ones(1, 7, dtype=torch.bool))[0])


def test_rank_plans_have_equally_many_micro_batches():
    lengths = [5, 9, 2, 7, 7, 3, 8]
    for num_ranks in (1, 2, 3):
        plans = [rank_plan(lengths, 10, num_ranks, rank) for rank in range(num_ranks)]
        assert len({len(plan) for plan in plans}) == 1
        assert sorted(i for plan in plans for part, weight in plan if weight for i in part) == list(range(7))
    assert [rank_plan([4, 2], 10, 3, rank) for rank in range(3)] == [[([0], 1.0)], [([1], 1.0)], [([1], 0.0)]]
    plans = [rank_plan([9, 1, 8, 2], 100, 2, rank) for rank in range(2)]
    assert [sorted(i for part, _ in plan for i in part) for plan in plans] == [[0, 1], [2, 3]]


def test_dynamic_batches_follow_the_token_count():
    def first(lengths: list[int], size: int, count: int, seed: int = 0) -> list[list[int]]:
        items = [Comparison([[0] * length], 0, [], [], "", str(i)) for i, length in enumerate(lengths)]
        batches = dynamic_batches(Mixture([items], None, seed).take, size * sum(lengths) / len(lengths))
        return [[int(item.source) for item in batch] for batch in islice(batches, count)]

    assert all(len(batch) == 8 for batch in first([10] * 50, 8, 20))
    lengths = [10] * 40 + [100] * 40  # mean 55, so that 16 pairs are 880 tokens
    for batch in first(lengths, 16, 30):
        total = sum(lengths[i] for i in batch)
        assert total > 880 - 100 and (len(batch) == 4 or total <= 880)
    assert max(map(len, first([1000] + [1] * 399, 120, 12))) == 128
    assert min(map(len, first([500, 1, 1, 1, 1, 1], 4, 12))) == 4
    epochs = [list(chain(*first([10] * 24, 8, 3, seed))) for seed in (0, 0, 1)]
    assert sorted(epochs[0]) == list(range(24)) and epochs[0] == epochs[1] != epochs[2]
