"""The order in which a run visits its items: a function of the seed and the position alone. Pure."""

import itertools
import math
import random
from functools import lru_cache

BLOCK = 1000  # items within which a mixture's shares hold


def order(start: int, count: int, num_items: int, seed: int) -> list[int]:
    """Indices of the run's items number `start` to `start + count - 1`, out of `num_items`.

    Epoch after epoch, each a fresh permutation, so that every item is seen once before any is seen again. Resuming
    needs only `start`; every rank computes the same list. More items than there are simply run into the next epoch.
    """
    if num_items < 1:
        raise ValueError("there are no items to put in order")
    if start < 0 or count < 0:
        raise ValueError(f"start and count must not be negative, not {start} and {count}")
    return [_permutation(seed, k // num_items, num_items)[k % num_items] for k in range(start, start + count)]


@lru_cache(maxsize=32)  # an epoch of each set of a mixture
def _permutation(seed: int, epoch: int, num_items: int) -> tuple[int, ...]:
    indices = list(range(num_items))
    random.Random(f"{seed}, {epoch}").shuffle(indices)
    return tuple(indices)


def mixture(start: int, count: int, sizes: list[int], weights: list[float], seed: int) -> list[tuple[int, int]]:
    """(set, index in it) of the items number `start` to `start + count - 1` of a run over several sets.

    sizes: items of each set; weights: their shares of the run, whatever their sizes, to 1 / BLOCK within every BLOCK
    items. Each set has its own epochs, as in `order`, so that a small set of large weight is seen more often. Like
    `order` a function of seed and position alone. ValueError for a share below 1 / BLOCK.
    """
    quotas = _quotas(weights)
    places = []
    for k in range(start, start + count):
        block, offset = divmod(k, BLOCK)
        chosen, before = _block(seed, block, quotas)[offset]
        places += [(chosen, i) for i in order(block * quotas[chosen] + before, 1, sizes[chosen], seed)]
    return places


def _quotas(weights: list[float]) -> tuple[int, ...]:
    """Items of each set among BLOCK: the weights scaled up, their running sum rounded."""
    ends = [math.floor(BLOCK * total / sum(weights) + 0.5) for total in itertools.accumulate(weights)]
    quotas = tuple(end - begin for begin, end in itertools.pairwise([0, *ends]))
    if min(quotas) < 1:
        raise ValueError(f"the weights {weights} give a set a share below 1 in {BLOCK}")
    return quotas


@lru_cache(maxsize=2)
def _block(seed: int, block: int, quotas: tuple[int, ...]) -> list[tuple[int, int]]:
    """(set, how many of the set the block has had before) for the BLOCK items of a block, in seeded order."""
    chosen = [k for k, quota in enumerate(quotas) for _ in range(quota)]
    random.Random(f"{seed}, sets, {block}").shuffle(chosen)
    counts = [itertools.count() for _ in quotas]
    return [(k, next(counts[k])) for k in chosen]
