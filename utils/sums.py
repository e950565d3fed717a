"""Metrics as sums and counts: a metric is a sum over ranks, tokens and steps, divided once by its count. Pure."""

import torch

Number = torch.Tensor | float
Sums = dict[str, tuple[Number, Number]]  # name -> (sum, count); tensors are scalars


def add(sums: Sums, more: Sums) -> None:
    """Adds sums and counts by name, in place."""
    for name, (total, count) in more.items():
        old_total, old_count = sums.get(name, (0.0, 0))
        sums[name] = (old_total + total, old_count + count)


def means(sums: Sums) -> dict[str, float]:
    """Returns name -> sum / count; 0 where nothing was counted."""
    return {name: float(total) / max(float(count), 1.0) for name, (total, count) in sums.items()}
