"""The order in which a run visits its items: a function of the seed and the position alone. Pure."""

import random
from functools import lru_cache


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


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, num_items: int) -> tuple[int, ...]:
    indices = list(range(num_items))
    random.Random(f"{seed}, {epoch}").shuffle(indices)
    return tuple(indices)
