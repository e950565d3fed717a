"""The losses of PPO-max. All divide by `num_tokens`, the response tokens of the whole global minibatch, so that

a minibatch split over micro-batches and ranks gives the same loss and the same gradient as in one piece.
Per-token tensors are [batch, length] float32; every loss is a scalar.
"""

import torch


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over True entries; what stands elsewhere, NaN included, is not read and gets no gradient."""
    return torch.where(mask, x, 0.0).sum()


def policy_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """ρ = π / π_old per token, 1 outside the response. [batch, length]."""
    return torch.exp((logprobs - old_logprobs).masked_fill(~response_mask, 0.0))


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    clip: float,
    num_tokens: float,
) -> torch.Tensor:
    """Σ -min(ρ A, clip(ρ, 1-ε, 1+ε) A) / num_tokens (Part I eq. 15). clip 0: the unclipped surrogate -ρ A."""
    ratio = policy_ratio(logprobs, old_logprobs, response_mask)
    surrogate = ratio * advantages
    if clip:
        surrogate = torch.minimum(surrogate, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages)
    return masked_sum(-surrogate, response_mask) / num_tokens


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    response_mask: torch.Tensor,
    clip: float,
    num_tokens: float,
) -> torch.Tensor:
    """Σ ½ max((V - R)², (clip(V, V_old ± c) - R)²) / num_tokens (Part I eq. 16). clip 0: no clipping."""
    values = torch.where(response_mask, values, 0.0)  # or NaN outside would reach the gradient as 0 x NaN
    squares = (values - returns).square()
    if clip:
        squares = torch.maximum(squares, (_near_old(values, old_values, clip) - returns).square())
    return masked_sum(0.5 * squares, response_mask) / num_tokens


def policy_clipped(ratio: torch.Tensor, advantages: torch.Tensor, clip: float) -> torch.Tensor:
    """True where clipping lowers the surrogate, so that the token's gradient is cut. [batch, length] bool.

    A ratio beyond 1 ± clip on the side that its advantage argues against is not clipped, and not counted.
    """
    return ratio.clamp(1.0 - clip, 1.0 + clip) * advantages < ratio * advantages


def value_clipped(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """True where clipping raises the loss, so that the value's gradient is cut. [batch, length] bool."""
    moved = (values - old_values).abs() > clip  # else the squares below differ by rounding alone
    return moved & ((_near_old(values, old_values, clip) - returns).square() > (values - returns).square())


def _near_old(values: torch.Tensor, old_values: torch.Tensor, clip: float) -> torch.Tensor:
    return old_values + (values - old_values).clamp(-clip, clip)


def entropy_bonus(entropy: torch.Tensor, response_mask: torch.Tensor, clip: float, num_tokens: float) -> torch.Tensor:
    """Σ min(H, clip) / num_tokens: tokens that are already more random than `clip` nats get no push (Part I Figure 16).

    clip 0: no clipping. The caller subtracts it from the loss.
    """
    return masked_sum(entropy.clamp(max=clip) if clip else entropy, response_mask) / num_tokens
