"""From lists of ids to rectangles: padding, batches by token budget, an even share for every rank. Pure."""

import torch

FORWARD_COST = 64  # what one more forward costs, in tokens: reading the weights, starting kernels
SHARED_FORWARD_COST = 256  # among several ranks, which under ZeRO exchange weights or gradients with each


def pad(sequences: list[list[int]], pad_id: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Stack `sequences` into int64 ids [batch, length] and the bool mask [batch, length] of their real tokens.

    The mask comes from lengths, never from `ids != pad_id`, so `pad_id` may also occur as a real token.
    `side` is where the padding goes: "right" for training and scoring, "left" for generation.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', not {side!r}")
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
    """Split indices into batches whose padded size, len(batch) * longest, stays within `max_tokens`.

    Of all splits of the sequences sorted by length, the one of the fewest padded tokens, where a batch more counts as
    FORWARD_COST of them. Longest first, so that memory peaks at once, not an hour in. A sequence longer than the
    budget stands alone. Every index occurs once; equal lengths keep their order. joined: the forward leaves padding
    out, and the real tokens stay within `max_tokens`.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    forward_cost = FORWARD_COST if num_ranks == 1 else SHARED_FORWARD_COST
    if joined:
        return _fill(order, lengths, max_tokens)
    # From the shortest on: the least cost of the rest, and how many its first batch takes (of a tie, the more).
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
    """Share indices out over `num_ranks` so that the token totals come out even; deterministic.

    Longest first, each to the rank with the fewest tokens so far (greedy scheduling, at most 4/3 of the best
    possible maximum). Every rank gets at least one item when there are enough; each share is in ascending order.
    most: no rank gets more items than this (and then 4/3 is no bound); `most * num_ranks` must do for all.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, not {num_ranks}")
    most = len(lengths) if most is None else most
    if most * num_ranks < len(lengths):
        raise ValueError(f"{num_ranks} ranks of at most {most} items have no room for {len(lengths)}")
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = (r for r in range(num_ranks) if len(shares[r]) < most)
        lightest = min(free, key=lambda r: (totals[r], len(shares[r]), r))
        shares[lightest].append(index)
        totals[lightest] += lengths[index]
    return [sorted(share) for share in shares]
