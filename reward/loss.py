"""Losses of the reward model on pairs of scores. Pure."""

import torch
import torch.nn.functional as F


def ranking_losses(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    margin: float | torch.Tensor = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """-(1 - a) log s(d - m) - a log s(m - d) of every pair, with d = chosen - rejected. [pairs] -> float32 [pairs].

    margin m: a number, or one a pair; label_smoothing a: the share of labels taken to be wrong. `logsigmoid` in
    float32 stays finite where log(sigmoid) does not. Part I eq. 2 (signs mended); Part II: adaptive margin, smoothing.
    """
    difference = chosen_scores.float() - rejected_scores.float() - margin
    return -(1 - label_smoothing) * F.logsigmoid(difference) - label_smoothing * F.logsigmoid(-difference)


def ranking_loss(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    margin: float | torch.Tensor = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean of `ranking_losses` over the pairs. [pairs] -> float32 scalar."""
    return ranking_losses(chosen_scores, rejected_scores, margin, label_smoothing).mean()


def ranking_hits(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """1 where the chosen answer has the higher score, 1/2 for a tie, else 0. [pairs] -> float32 [pairs]."""
    return 0.5 * (torch.sign(chosen_scores.float() - rejected_scores.float()) + 1)


def simcse_losses(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """-log of the share that a pair's own second view has in exp(cos(first_i, second_j) / t), summed over all j.

    first, second: [pairs, hidden], two views of every pair under different dropout; all other pairs are its negatives.
    -> float32 [pairs]; 0 for a single pair. SimCSE (arXiv 2104.08821) eq. 4; as Part II's contrastive term the
    features are differences of the last hidden states of chosen and rejected.
    """
    first, second = (F.normalize(x.float(), dim=1, eps=1e-3) for x in (first, second))  # bounds the gradient at 0
    similarity = first @ second.T / temperature
    return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device), reduction="none")
