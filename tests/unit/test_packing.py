"""data/batching/packing.py: nothing is lost, rows fit and are nearly full, positions begin anew."""

import random

import pytest
import torch

from data.batching.packing import pack, restarting_positions
from utils.tensors import position_ids


def test_a_small_case_by_hand():
    """6 takes a row; 5 another; 4 fills the first; 3 fits the second; 2 fills it."""
    assert pack([2, 6, 3, 5, 4], 10) == [[1, 4], [3, 2, 0]]


def test_the_fullest_row_that_has_room_is_taken():
    """7, 6 and 5 make rows with 3, 4 and 5 left: 4 goes to the 6, 3 to the 7."""
    assert pack([7, 6, 5, 4, 3], 10) == [[0, 4], [1, 3], [2]]


def test_what_is_too_long_stands_alone_and_equal_lengths_keep_their_order():
    assert pack([3, 12, 3, 3], 6) == [[1], [0, 2], [3]]
    assert pack([], 6) == []
    with pytest.raises(ValueError, match="window"):
        pack([1], 0)


def lengths_of(kind: str, rng: random.Random) -> list[int]:
    """Full windows cut into pieces, so that a perfect packing exists; or lengths log-uniform in 32 to 512."""
    if kind == "log-uniform":
        return [int(32 * 16 ** rng.random()) for _ in range(300)]
    pieces = []
    for _ in range(40):
        cuts = sorted(rng.sample(range(1, 512), rng.randint(0, 6)))
        pieces += [stop - start for start, stop in zip([0, *cuts], [*cuts, 512])]
    rng.shuffle(pieces)
    return pieces


@pytest.mark.parametrize(("kind", "fill"), [("log-uniform", 0.98), ("cut windows", 0.95)])
def test_rows_fit_are_nearly_full_and_hold_everything(kind, fill):
    for seed in range(5):
        lengths = lengths_of(kind, random.Random(seed))
        rows = pack(lengths, 512)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in row) for row in rows) <= 512
        assert sum(lengths) / (512 * len(rows)) >= fill


def test_rows_are_within_eleven_ninths_of_the_best():
    for seed in range(20):
        assert len(pack(lengths_of("cut windows", random.Random(seed)), 512)) <= 11 / 9 * 40 + 6 / 9


def test_positions_begin_anew_and_run_on_over_the_padding():
    assert restarting_positions([2, 3, 1], 6).tolist() == [0, 1, 0, 1, 2, 0]
    assert restarting_positions([2, 3, 1], 9).tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]


def test_one_sequence_has_the_positions_of_a_plain_row():
    assert torch.equal(restarting_positions([4], 7), position_ids(torch.ones(1, 7, dtype=torch.bool))[0])
