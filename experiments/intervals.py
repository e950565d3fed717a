"""95 % intervals of the experiments: over seeds, and over held-out items."""

import math
import statistics

import torch

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by count


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Returns (mean, half the width of its interval by Student's t); the second is NaN without 2 to 10 values."""
    count = len(values)
    if count not in STUDENT:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), STUDENT[count] * statistics.stdev(values) / math.sqrt(count)


def perplexity(nll: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float, float]:
    """Returns (perplexity, low, high) by bootstrap over items, seed 0. nll: [items], summed; tokens: [items]."""
    draws = torch.randint(len(nll), (2000, len(nll)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(nll[draws].sum(1) / tokens[draws].sum(1), torch.tensor([0.025, 0.975])).exp().tolist()
    return (nll.sum() / tokens.sum()).exp().item(), low, high
