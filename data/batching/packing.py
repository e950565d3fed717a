"""Pack several dialogues into one row of a forward pass, and compute their positions. Pure."""

import bisect

import torch


def pack(lengths: list[int], window: int) -> list[list[int]]:
    """Splits indices into rows of at most `window` tokens by best-fit decreasing: at most 11/9 of the optimal number.

    Each sequence, longest first, goes into the fullest row with room for it. A sequence longer than the window gets
    its own row. Each index occurs once; deterministic.
    """
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
    """Returns positions that restart at 0 for each sequence, and continue over the padding: int64 [width]."""
    sizes = torch.tensor(lengths)
    sizes[-1] += width - sizes.sum()
    starts = sizes.cumsum(0) - sizes
    return torch.arange(width) - starts.repeat_interleave(sizes)
