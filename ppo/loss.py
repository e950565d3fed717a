"""The losses of PPO-max. Per-token tensors are [batch, length] float32; every loss is a scalar.

All divide by `num_tokens`, the response tokens of the whole global minibatch, so that splitting a minibatch over
micro-batches and ranks changes neither the loss nor the gradient.
"""

import torch


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the sum over True entries. Other entries, NaN included, do not contribute and get no gradient."""
    return torch.where(mask, x, 0.0).sum()


def policy_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Returns ρ = π / π_old per token, 1 outside the response. [batch, length]."""
    return torch.exp((logprobs - old_logprobs).masked_fill(~response_mask, 0.0))


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor,
    clip: float, num_tokens: float,
) -> torch.Tensor:  # fmt: skip
    """Returns Σ -min(ρ A, clip(ρ, 1-ε, 1+ε) A) / num_tokens (Part I eq. 15). clip 0: the unclipped surrogate -ρ A."""
    ratio = policy_ratio(logprobs, old_logprobs, response_mask)
    surrogate = ratio * advantages
    if clip:
        surrogate = torch.minimum(surrogate, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages)
    return masked_sum(-surrogate, response_mask) / num_tokens


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, response_mask: torch.Tensor, clip: float,
    num_tokens: float,
) -> torch.Tensor:  # fmt: skip
    """Returns Σ ½ max((V - R)², (clip(V, V_old ± c) - R)²) / num_tokens (Part I eq. 16). clip 0: no clipping."""
    values = torch.where(response_mask, values, 0.0)  # a NaN outside would reach the gradient as 0 * NaN
    squares = (values - returns).square()
    if clip:
        squares = torch.maximum(squares, (_near_old(values, old_values, clip) - returns).square())
    return masked_sum(0.5 * squares, response_mask) / num_tokens


def policy_clipped(ratio: torch.Tensor, advantages: torch.Tensor, clip: float) -> torch.Tensor:
    """Returns True where clipping lowers the surrogate, so that the token has no gradient. [batch, length] bool.

    A ratio below 1 - clip with a positive advantage, or above 1 + clip with a negative one, is not clipped.
    """
    return ratio.clamp(1.0 - clip, 1.0 + clip) * advantages < ratio * advantages


def value_clipped(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """Returns True where clipping raises the loss, so that the value has no gradient. [batch, length] bool."""
    moved = (values - old_values).abs() > clip  # otherwise the squares below differ only by rounding
    return moved & ((_near_old(values, old_values, clip) - returns).square() > (values - returns).square())


def _near_old(values: torch.Tensor, old_values: torch.Tensor, clip: float) -> torch.Tensor:
    return old_values + (values - old_values).clamp(-clip, clip)


def entropy_bonus(entropy: torch.Tensor, response_mask: torch.Tensor, clip: float, num_tokens: float) -> torch.Tensor:
    """Returns Σ min(H, clip) / num_tokens: tokens with an entropy above `clip` nats get no gradient (Part I Figure 16).

    clip 0: no clipping. The caller subtracts the bonus from the loss.
    """
    return masked_sum(entropy.clamp(max=clip) if clip else entropy, response_mask) / num_tokens
