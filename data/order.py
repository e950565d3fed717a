"""The data order of a run, as a function of the seed and the position only. Pure."""

import itertools
import math
import random
from functools import lru_cache
from hashlib import blake2b

MAX_SHUFFLED = 1 << 20  # items up to which an epoch's order is kept as a list
BLOCK = 1000  # number of items within which the shares of a mixture are exact


def order(start: int, count: int, num_items: int, seed: int) -> list[int]:
    """Returns the indices of the items at `count` positions from `start` on; each epoch is a new seeded permutation."""
    if num_items > MAX_SHUFFLED:
        return [_permuted(k % num_items, num_items, f"{seed}, {k // num_items}") for k in range(start, start + count)]
    return [_permutation(seed, k // num_items, num_items)[k % num_items] for k in range(start, start + count)]


def _permuted(index: int, num_items: int, key: str) -> int:
    """Returns the place of an index in a permutation of range(num_items) that takes no memory.

    A Feistel network permutes the next power of 4; indices that it puts beyond the range go through it again (cycle
    walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    bits = ((num_items - 1).bit_length() + 1) // 2
    while True:
        left, right = divmod(index, 1 << bits)
        for round_key in _round_keys(key):
            mixed = int.from_bytes(
                blake2b(right.to_bytes(8, "little"), key=round_key, digest_size=8).digest(), "little"
            )
            left, right = right, left ^ mixed % (1 << bits)
        index = left << bits | right
        if index < num_items:
            return index


@lru_cache(maxsize=32)
def _round_keys(key: str) -> tuple[bytes, ...]:
    return tuple(blake2b(f"{key}, {k}".encode()).digest() for k in range(4))


@lru_cache(maxsize=32)  # one epoch per set of a mixture
def _permutation(seed: int, epoch: int, num_items: int) -> tuple[int, ...]:
    indices = list(range(num_items))
    random.Random(f"{seed}, {epoch}").shuffle(indices)
    return tuple(indices)


def mixture(start: int, count: int, sizes: list[int], weights: list[float], seed: int) -> list[tuple[int, int]]:
    """Returns (set, index in the set) for positions `start` to `start + count - 1` of a run over several sets.

    sizes: items per set; weights: share of each, exact to 1 / BLOCK within each BLOCK positions. Each set has its own
    epochs as in `order`. Raises ValueError for a share below 1 / BLOCK.
    """
    quotas = _quotas(weights)
    places = []
    for k in range(start, start + count):
        block, offset = divmod(k, BLOCK)
        chosen, before = _block(seed, block, quotas)[offset]
        places += [(chosen, i) for i in order(block * quotas[chosen] + before, 1, sizes[chosen], seed)]
    return places


def _quotas(weights: list[float]) -> tuple[int, ...]:
    """Returns the number of items per set in a block, from the rounded cumulative weights."""
    ends = [math.floor(BLOCK * total / sum(weights) + 0.5) for total in itertools.accumulate(weights)]
    quotas = tuple(end - begin for begin, end in itertools.pairwise([0, *ends]))
    if min(quotas) < 1:
        raise ValueError(f"the weights {weights} give a set a share below 1/{BLOCK}")
    return quotas


@lru_cache(maxsize=2)
def _block(seed: int, block: int, quotas: tuple[int, ...]) -> list[tuple[int, int]]:
    """Returns (set, number of earlier items of that set in the block) for each item of a block, in seeded order."""
    chosen = [k for k, quota in enumerate(quotas) for _ in range(quota)]
    random.Random(f"{seed}, sets, {block}").shuffle(chosen)
    counts = [itertools.count() for _ in quotas]
    return [(k, next(counts[k])) for k in chosen]
