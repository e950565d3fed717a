"""Padding masks come from lengths; batches keep the token budget; every rank gets its share."""

import random
from itertools import chain, pairwise

import pytest
import torch

from data.batching.collate import balance, micro_batches, pad


def test_pad_right_and_left():
    ids, mask = pad([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    ids, mask = pad([[5, 6, 7], [8]], 9, side="left")
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool


def test_a_real_token_with_the_pads_id_counts():
    mask = pad([[0, 0, 4], [0]], 0)[1]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_pad_of_empty_sequences_and_of_nothing():
    ids, mask = pad([[], [3]], 0, side="left")
    assert ids.tolist() == [[0], [3]]
    assert mask.tolist() == [[False], [True]]
    assert pad([], 0)[0].shape == (0, 0)
    with pytest.raises(ValueError, match="side"):
        pad([[1]], 0, side="middle")


def test_micro_batches_by_hand():
    # 5 and 4 make 2 × 5 = 10; a third row would make 15. 3, 2, 1 make 3 × 3 = 9. The 12 is too long and stands alone.
    assert micro_batches([3, 12, 5, 1, 4, 2], 10) == [[1], [2, 4], [0, 5, 3]]
    assert micro_batches([], 10) == []
    with pytest.raises(ValueError, match="max_tokens"):
        micro_batches([1], 0)


def test_micro_batches_keep_the_budget_and_lose_nothing():
    rng = random.Random(0)
    for _ in range(100):
        lengths = [rng.randint(1, 50) for _ in range(rng.randint(1, 40))]
        batches = micro_batches(lengths, 64)
        assert sorted(chain(*batches)) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 64


def test_balance_by_hand():
    # 8 to the first; 7, then 6 to the second (13); 5 to the first (13); of a tie the first takes 4, the second 3.
    assert balance([3, 4, 5, 6, 7, 8], 2) == [[1, 2, 5], [0, 3, 4]]
    assert balance([1, 1, 1], 1) == [[0, 1, 2]]


def test_balance_is_even_and_serves_every_rank():
    rng = random.Random(1)
    for _ in range(100):
        num_ranks = rng.randint(1, 6)
        lengths = [rng.choice([0, 1, 5, 100, 500]) for _ in range(rng.randint(num_ranks, 40))]
        shares = balance(lengths, num_ranks)
        assert sorted(chain(*shares)) == list(range(len(lengths)))
        assert all(shares)
        totals = [sum(lengths[i] for i in share) for share in shares]
        assert max(totals) - min(totals) <= max(lengths)
        assert shares == balance(lengths, num_ranks)


def test_balance_of_equal_shares_is_about_even():
    # 9 and 8 go to a rank each; the first 1 to that with 8, which is full then; the other to that with 9.
    assert balance([9, 8, 1, 1], 2, most=2) == [[0, 3], [1, 2]]
    rng = random.Random(1)
    for _ in range(100):
        num_ranks, size = rng.randint(1, 6), rng.randint(1, 16)
        lengths = [rng.randint(1, 500) for _ in range(num_ranks * size)]
        shares = balance(lengths, num_ranks, size)
        assert sorted(chain(*shares)) == list(range(len(lengths)))
        assert {len(share) for share in shares} == {size}
        totals = [sum(lengths[i] for i in share) for share in shares]
        assert max(totals) - min(totals) <= max(lengths)


def test_balance_with_fewer_items_than_ranks():
    assert balance([4, 9], 3) == [[1], [0], []]
    with pytest.raises(ValueError, match="num_ranks"):
        balance([1], 0)
    with pytest.raises(ValueError, match="no room for 3"):
        balance([1, 2, 3], 2, most=1)


def test_micro_batches_trade_padding_for_forwards():
    # One more forward counts 64 tokens: 404 with 307 would waste 97, 182 with 180 and 136 wastes 48.
    lengths = [182, 307, 104, 109, 136, 234, 180, 404]
    assert micro_batches(lengths, 2048) == [[7], [1], [5], [0, 6, 4], [3, 2]]
    # Of several ranks each counts 256, so that 404, 307 and 234 go together: 267 wasted.
    assert micro_batches(lengths, 2048, num_ranks=8) == [[7, 1, 5], [0, 6, 4, 3, 2]]


def test_micro_batches_are_the_cheapest_of_all_splits():
    rng = random.Random(2)
    for _ in range(30):
        lengths = sorted((rng.randint(1, 300) for _ in range(8)), reverse=True)
        costs = []
        for cuts in range(2**7):  # every way to cut the sorted row
            starts = [0] + [i + 1 for i in range(7) if cuts >> i & 1] + [8]
            sizes = [(end - start, (end - start) * lengths[start]) for start, end in pairwise(starts)]
            if all(count == 1 or padded <= 600 for count, padded in sizes):
                costs.append(sum(padded + 64 for _, padded in sizes))
        batches = micro_batches(lengths, 600)
        assert sum(len(batch) * lengths[batch[0]] + 64 for batch in batches) == min(costs)


def test_micro_batches_of_joined_rows_count_real_tokens():
    assert micro_batches([3, 12, 5, 1, 4, 2], 10, joined=True) == [[1], [2, 4], [0, 5, 3]]
    assert micro_batches([3, 5, 1, 1], 10, joined=True) == [[1, 0, 2, 3]]
