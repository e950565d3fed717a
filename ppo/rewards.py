"""Converts scores of responses to rewards per token."""

import torch

from utils.moments import RunningMoments
from utils.tensors import last_index


def per_token(scores: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Returns the scores divided by the lengths of their responses; that of an empty one is unchanged. [batch]."""
    return scores / response_mask.sum(1).clamp(min=1)


def shape_scores(
    scores: torch.Tensor, moments: RunningMoments, center: bool, scale: bool, clip: float, penalties: torch.Tensor
) -> torch.Tensor:
    """Returns clip((score - mean) / std, -clip, clip) with running statistics (Part I eq. 18). [batch] -> [batch].

    center: subtract the mean and divide; scale: divide only; clip 0: no clipping. moments: already updated. penalties
    [batch]: added after clipping, in standard deviations (0, or minus the penalty of a truncated or long response).
    """
    if center:
        scores = scores - moments.mean
    if center or scale:
        scores = scores / moments.std
    if clip:
        scores = scores.clamp(-clip, clip)
    return scores + penalties * (1.0 if center or scale else moments.std)


def overlong_penalty(lengths: torch.Tensor, limit: int, buffer: int, factor: float) -> torch.Tensor:
    """Returns -factor · clip((length - (limit - buffer)) / buffer, 0, 1) (DAPO, arXiv 2503.14476, eq. 13). [batch]."""
    return -factor * ((lengths - (limit - buffer)) / buffer).clamp(0.0, 1.0)


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, response_mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Returns R_t = -kl_coef · kl_t, plus the score at the last response token (Part I eq. 19).

    scores [batch], shaped and clipped; kl, response_mask [batch, length] -> [batch, length], 0 outside the response.
    """
    rewards = (-kl_coef * kl).masked_fill(~response_mask, 0.0)
    last = last_index(response_mask)
    carries = response_mask.any(dim=1)
    rows = torch.arange(len(rewards), device=rewards.device)[carries]
    rewards[rows, last[carries]] += scores[carries].to(rewards.dtype)
    return rewards
