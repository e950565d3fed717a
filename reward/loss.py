"""Losses of the reward model. Pure."""

import torch
import torch.nn.functional as F


def ranking_losses(
    chosen_scores: torch.Tensor, rejected_scores: torch.Tensor, margin: float | torch.Tensor = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Returns -(1 - a) logsigmoid(d - m) - a logsigmoid(m - d) per pair, d = chosen - rejected: float32 [pairs].

    margin m: a number or [pairs]; label_smoothing a: assumed share of wrong labels. Part I eq. 2 (with corrected
    signs); Part II: adaptive margin and label smoothing.
    """
    difference = chosen_scores.float() - rejected_scores.float() - margin
    return -(1 - label_smoothing) * F.logsigmoid(difference) - label_smoothing * F.logsigmoid(-difference)


def ranking_loss(
    chosen_scores: torch.Tensor, rejected_scores: torch.Tensor, margin: float | torch.Tensor = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Returns the mean of `ranking_losses` over the pairs: float32 scalar."""
    return ranking_losses(chosen_scores, rejected_scores, margin, label_smoothing).mean()


def ranking_hits(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """Returns 1 per pair whose chosen answer has the higher score, 1/2 for a tie, otherwise 0: float32 [pairs]."""
    return 0.5 * (torch.sign(chosen_scores.float() - rejected_scores.float()) + 1)


def simcse_losses(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns -log softmax_j(cos(first_i, second_j) / temperature) at j = i per pair: float32 [pairs].

    first, second: [pairs, hidden], views of each pair under different dropout. SimCSE (arXiv 2104.08821) eq. 4.
    """
    first, second = (F.normalize(x.float(), dim=1, eps=1e-3) for x in (first, second))  # bounds the gradient at 0
    similarity = first @ second.T / temperature
    return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device), reduction="none")
