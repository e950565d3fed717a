"""What the critic knows: explained variance by position, calibration, and what no critic can explain. Pure.

Per-token tensors are [batch, length]; returns and values are those of the buffer, before the update.
"""

import torch

from ppo.advantages import gae

QUARTERS = 4


def explained_variance(returns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns 1 - Var(returns - values) / Var(returns) over all elements, with population variances."""
    return 1.0 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)


def critic_metrics(returns: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns metrics over the response tokens of a buffer: explained variance by position, slope and bias.

    explained_variance_1 … _4: over the tokens of each quarter of the responses, by (place in the response) / (length of
    the response); without the quarters that have fewer than two tokens. value_slope: least-squares slope of return on
    value, Cov(returns, values) / Var(values). value_bias: mean return - mean value.
    """
    places = response_mask.cumsum(1) - 1
    quarters = places * QUARTERS // response_mask.sum(1, keepdim=True).clamp(min=1)
    metrics = {}
    for i in range(QUARTERS):
        inside = response_mask & (quarters == i)
        if int(inside.sum()) > 1:
            metrics[f"explained_variance_{i + 1}"] = explained_variance(returns[inside], values[inside])
    found, expected = returns[response_mask], values[response_mask]
    distance = expected - expected.mean()
    slope = (distance * found).mean() / distance.square().mean().clamp(min=1e-8)
    return metrics | {"value_slope": slope, "value_bias": found.mean() - expected.mean()}


def return_noise(
    rewards: torch.Tensor, response_mask: torch.Tensor, groups: torch.Tensor, gamma: float
) -> torch.Tensor | None:
    """Returns the share of the variance of the first token's return (λ = 1) that lies within prompts.

    A critic sees the prompt alone there, so that it cannot explain more than the rest. Both variances are unbiased:
    within = Σ (x - mean of its prompt)² / Σ (n - 1); all = Var(means of prompts) + within · (1 - mean of 1 / n), with n
    responses to a prompt. None with fewer than two prompts of at least two responses each, or where all is 0.
    """
    returns = gae(rewards, torch.zeros_like(rewards), response_mask, gamma, lam=1.0)[1].double()
    first = response_mask & (response_mask.cumsum(1) == 1)
    x = torch.where(first, returns, 0.0).sum(1)
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    several = counts[index] > 1
    if int((counts > 1).sum()) < 2:
        return None
    _, index, counts = groups[several].unique(return_inverse=True, return_counts=True)
    x, counts = x[several], counts.double()
    means = torch.zeros_like(counts).index_add(0, index, x) / counts
    within = (x - means[index]).square().sum() / (counts - 1).sum()
    whole = means.var() + within * (1.0 - counts.reciprocal().mean())
    return (within / whole).float() if float(whole) > 0.0 else None
