"""Several dialogues in one row of a forward pass: which go together, and their positions. Pure."""

import bisect

import torch


def pack(lengths: list[int], window: int) -> list[list[int]]:
    """Split indices into rows of at most `window` tokens, as few as best-fit decreasing finds: within 11/9 of the best.

    Longest first, each into the fullest row that has room for it. A sequence longer than the window has a row to
    itself. Every index occurs once; deterministic.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[index], 0))
        if place == len(room):
            room.append((window, len(rows)))
            rows.append([])
        left, row = room.pop(place)
        rows[row].append(index)
        bisect.insort(room, (left - lengths[index], row))
    return rows


def restarting_positions(lengths: list[int], width: int) -> torch.Tensor:
    """0, 1, 2 … anew for each of the sequences that stand side by side in a row of `width`. -> int64 [width].

    The last one's numbers run on over the padding: it belongs to no other sequence, and causality hides it.
    """
    sizes = torch.tensor(lengths)
    sizes[-1] += width - sizes.sum()
    starts = sizes.cumsum(0) - sizes
    return torch.arange(width) - starts.repeat_interleave(sizes)
