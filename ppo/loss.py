"""The losses of PPO-max. Per-token tensors are [batch, length] float32; every loss is a scalar.

All divide by `num_tokens`, the response tokens of the whole global minibatch, so that splitting a minibatch over
micro-batches and ranks changes neither the loss nor the gradient.
"""

import torch

from utils.tensors import sum_by_group


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the sum over True entries. Other entries, NaN included, do not contribute and get no gradient."""
    return torch.where(mask, x, 0.0).sum()


def policy_ratio(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, response_mask: torch.Tensor, kind: str = "token"
) -> torch.Tensor:  # fmt: skip
    """Returns ρ = π / π_old per token, 1 outside the response. [batch, length].

    kind: "sequence" gives each token of a response their geometric mean (GSPO, arXiv 2507.18071, eq. 7).
    """
    logs = (logprobs - old_logprobs).masked_fill(~response_mask, 0.0)
    if kind == "sequence":
        means = logs.sum(1, keepdim=True) / response_mask.sum(1, keepdim=True).clamp(min=1)
        logs = means.expand_as(logs).masked_fill(~response_mask, 0.0)
    return torch.exp(logs)


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor,
    clip: float, num_tokens: float, clip_high: float | None = None, dual_clip: float = 0.0, kind: str = "token",
) -> torch.Tensor:  # fmt: skip
    """Returns Σ -min(ρ A, clip(ρ, 1-ε, 1+ε) A) / num_tokens (Part I eq. 15). clip 0: the unclipped surrogate -ρ A.

    clip_high: ε above 1 (DAPO, arXiv 2503.14476, eq. 10). dual_clip c: for A < 0, at least c A (Ye et al. 2020, eq. 4).
    kind: of `policy_ratio`; "none": Σ -log π A / num_tokens, as REINFORCE, without ratio and clipping.
    """
    if kind == "none":
        return masked_sum(-logprobs * advantages, response_mask) / num_tokens
    ratio = policy_ratio(logprobs, old_logprobs, response_mask, kind)
    surrogate = ratio * advantages
    if clip:
        high = clip if clip_high is None else clip_high
        surrogate = torch.minimum(surrogate, ratio.clamp(1.0 - clip, 1.0 + high) * advantages)
    if dual_clip:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    return masked_sum(-surrogate, response_mask) / num_tokens


def row_weights(
    response_mask: torch.Tensor, groups: torch.Tensor | None, average: str, max_length: int
) -> torch.Tensor:
    """Returns w with Σ_i w_i Σ_t loss_it / num_tokens = the mean that --loss_average names, over a whole minibatch.

    response_mask: [batch, length]; groups: [batch]; max_length: --maxlen_res -> [batch] float32; Σ_i w_i · length_i is
    num_tokens, but for "constant". Empty responses weigh 0, and do not count as sequences or groups.
    """
    lengths = response_mask.sum(1).float()
    if average == "token":
        return torch.ones_like(lengths)
    num_tokens, filled = lengths.sum(), (lengths > 0).float()
    if average == "constant":
        return num_tokens / (filled.sum().clamp(min=1) * max_length) * filled
    if average == "sequence":
        return num_tokens / filled.sum().clamp(min=1) * filled / lengths.clamp(min=1)
    num_groups = max(1, len(groups[lengths > 0].unique()))
    return num_tokens / num_groups * filled / sum_by_group(lengths, groups).clamp(min=1)


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


def policy_clipped(
    ratio: torch.Tensor, advantages: torch.Tensor, clip: float, clip_high: float | None = None, dual_clip: float = 0.0
) -> torch.Tensor:
    """Returns True where clipping changes the surrogate, so that the token has no gradient. [batch, length] bool.

    A ratio below 1 - clip with a positive advantage, or above 1 + clip_high with a negative one, is not clipped; above
    dual_clip, the latter is. clip 0: only dual_clip.
    """
    high = clip if clip_high is None else clip_high
    clipped = ratio.clamp(1.0 - clip, 1.0 + high) * advantages < ratio * advantages
    clipped = clipped & bool(clip)
    return clipped | ((advantages < 0) & (ratio > dual_clip)) if dual_clip else clipped


def value_clipped(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """Returns True where clipping raises the loss, so that the value has no gradient. [batch, length] bool.

    clip 0: nowhere.
    """
    moved = (values - old_values).abs() > (clip or torch.inf)  # otherwise the squares below differ only by rounding
    return moved & ((_near_old(values, old_values, clip) - returns).square() > (values - returns).square())


def _near_old(values: torch.Tensor, old_values: torch.Tensor, clip: float) -> torch.Tensor:
    return old_values + (values - old_values).clamp(-clip, clip)


def entropy_bonus(
    entropy: torch.Tensor,
    response_mask: torch.Tensor,
    clip: float,
    num_tokens: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns Σ min(H, clip) / num_tokens: tokens with an entropy above `clip` nats get no gradient (Part I Figure 16).

    clip 0: no clipping. weights [batch, 1]: factors, of `row_weights`. The caller subtracts the bonus from the loss.
    """
    entropy = entropy.clamp(max=clip) if clip else entropy
    return masked_sum(entropy if weights is None else weights * entropy, response_mask) / num_tokens
