"""Padding masks come from lengths; batches keep the token budget; every rank gets its share."""

import random
from itertools import chain

import pytest
import torch

from data.collate import balance, micro_batches, pad


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


def test_balance_with_fewer_items_than_ranks():
    assert balance([4, 9], 3) == [[1], [0], []]
    with pytest.raises(ValueError, match="num_ranks"):
        balance([1], 0)
