"""Random streams: what is kept is all of them, to the last half of a pair, and no two ranks have the same."""

import json
import random

import numpy as np
import pytest
import torch

from utils.run.random_state import random_state, seed_streams, set_random_state


def draws() -> tuple[float, ...]:
    """Normal numbers, which Python and NumPy draw in pairs and keep the second of, and a few others."""
    normal = (random.gauss(0, 1), float(np.random.normal()), float(torch.randn(())))
    return (*normal, random.random(), float(np.random.rand()), float(torch.rand(())))


def test_streams_go_on_where_they_were():
    seed_streams(5, 1)
    draws()  # leaves half a pair behind
    kept = json.loads(json.dumps(random_state()))
    expected = [draws() for _ in range(3)]
    assert len(set(expected)) == 3
    seed_streams(6, 0)
    draws()
    draws()
    set_random_state(kept)
    assert [draws() for _ in range(3)] == expected


@pytest.mark.gpu
def test_the_gpu_of_this_process_is_among_them():
    """And no other: a run that goes on may see fewer."""
    seed_streams(5, 1)
    kept = json.loads(json.dumps(random_state()))
    expected = torch.rand(3, device="cuda")
    set_random_state(kept)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_each_rank_and_seed_has_streams_of_its_own():
    seen = set()
    for seed in (0, 1, 42):
        for rank in (0, 1, 2):
            seed_streams(seed, rank)
            seen.add(draws())
            seed_streams(seed, rank)
            assert draws() in seen
    assert len(seen) == 9
