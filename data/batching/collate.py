"""Padding, micro-batches within a token budget, and an even split over ranks. Pure."""

import torch

FORWARD_COST = 64  # cost of one more forward pass in tokens: reading the weights, launching kernels
SHARED_FORWARD_COST = 256  # the same with several ranks, which under ZeRO communicate in each pass


def pad(sequences: list[list[int]], pad_id: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (ids, mask) of the padded sequences: int64 and bool [batch, length]; the mask is True at real tokens.

    The mask is built from lengths, never from `ids != pad_id`: `pad_id` can also be a real token.
    side: where the padding goes: "right" for training and scoring, "left" for generation.
    """
    length = max(map(len, sequences), default=0)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        start = length - len(sequence) if side == "left" else 0
        stop = start + len(sequence)
        ids[row, start:stop] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, start:stop] = True
    return ids, mask


def micro_batches(lengths: list[int], max_tokens: int, num_ranks: int = 1, joined: bool = False) -> list[list[int]]:
    """Splits indices into batches whose padded size, len(batch) * longest, is at most `max_tokens`.

    Returns the split of the sorted sequences, longest first, with the fewest padded tokens plus FORWARD_COST per batch.
    A sequence longer than `max_tokens` is a batch of its own. joined: passes have no padding: count real tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    forward_cost = FORWARD_COST if num_ranks == 1 else SHARED_FORWARD_COST
    if joined:
        return _fill(order, lengths, max_tokens)
    # Dynamic programming from the shortest on: the lowest cost of the rest and the size of its first batch (the larger
    # size if two cost the same).
    costs, sizes = [0] * (len(order) + 1), [0] * len(order)
    for start in reversed(range(len(order))):
        longest = lengths[order[start]]
        most = min(max(1, max_tokens // max(1, longest)), len(order) - start)
        sizes[start] = min(range(most, 0, -1), key=lambda n: n * longest + costs[start + n])
        costs[start] = sizes[start] * longest + costs[start + sizes[start]] + forward_cost
    batches, start = [], 0
    while start < len(order):
        batches.append(order[start : start + sizes[start]])
        start += sizes[start]
    return batches


def _fill(order: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    batches, left = [], 0
    for index in order:
        if not batches or lengths[index] > left:
            batches.append([])
            left = max_tokens
        batches[-1].append(index)
        left -= lengths[index]
    return batches


def balance(lengths: list[int], num_ranks: int, most: int | None = None) -> list[list[int]]:
    """Distributes indices over ranks with about equal token totals; deterministic.

    Each item, longest first, goes to the rank with the fewest tokens so far. Each rank gets at least one item if there
    are enough. most: maximum number of items per rank; `most * num_ranks` must be at least the number of items.
    """
    most = len(lengths) if most is None else most
    assert most * num_ranks >= len(lengths)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = (r for r in range(num_ranks) if len(shares[r]) < most)
        lightest = min(free, key=lambda r: (totals[r], len(shares[r]), r))
        shares[lightest].append(index)
        totals[lightest] += lengths[index]
    return [sorted(share) for share in shares]
