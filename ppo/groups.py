"""Groups of responses to the same prompt, and --drop_uniform_groups. Pure."""

from dataclasses import fields, replace

import torch
from torch.nn.functional import pad

from ppo.types import Batch, Rollout, Scores

EQUAL = 1e-5  # largest relative difference of equal scores: two equal responses are scored in different batches


def in_uniform_groups(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Returns True for each response of a group whose scores are equal to rounding. All [batch]."""
    names, index = groups.unique(return_inverse=True)
    low, high = (
        torch.full((len(names),), start, dtype=scores.dtype, device=scores.device).scatter_reduce(
            0, index, scores, how
        )[index]
        for start, how in ((torch.inf, "amin"), (-torch.inf, "amax"))
    )
    return high - low <= EQUAL * torch.maximum(low.abs(), high.abs())


def mixed_rows(scores: Scores) -> torch.Tensor:
    """Returns the rows of groups with different scores. Responses without a score (`failed`) do not count."""
    rows = torch.arange(len(scores), device=scores.scores.device)
    if scores.failed is not None:
        rows = rows[~scores.failed]
    return rows[~in_uniform_groups(scores.scores[rows], scores.groups[rows])]


def is_full(parts: list[tuple[Rollout, Scores]], count: int, max_refills: int) -> bool:
    """Whether the step has sampled enough: `count` groups with different scores, or the buffer and `max_refills` more.

    A refill has as many prompts as the buffer, so that what is sampled does not depend on the number of ranks.
    """
    if len(parts) > max_refills:
        return True
    return len(torch.cat([scores.groups[mixed_rows(scores)] for _, scores in parts]).unique()) >= count


def rows_to_train(scores: Scores, count: int) -> torch.Tensor:
    """Returns the rows of the first `count` groups that are not uniform, or of any groups if all are uniform."""
    rows = mixed_rows(scores)
    rows = rows if len(rows) else torch.arange(len(scores), device=scores.scores.device)
    return rows[scores.groups[rows].unique(return_inverse=True)[1] < count]


def uniform_fraction(scores: Scores) -> float:
    """Returns the share of the groups whose scores are all equal."""
    return 1.0 - len(scores.groups[mixed_rows(scores)].unique()) / len(scores.groups.unique())


def with_same_parts(batches: list[Batch]) -> list[Batch]:
    """Returns scores whose `parts` have the same columns: those of all of them, NaN where a --reward_fn gave none."""
    names = tuple(dict.fromkeys(name for batch in batches for name in getattr(batch, "part_names", ())))

    def aligned(batch: Batch) -> Batch:
        columns = dict(zip(batch.part_names, batch.parts.T, strict=True))
        missing = torch.full_like(batch.scores, torch.nan)
        return replace(batch, parts=torch.stack([columns.get(name, missing) for name in names], 1), part_names=names)

    return [aligned(batch) for batch in batches] if names else batches


def concat(batches: list[Batch]) -> Batch:
    """Joins the rows of batches of one kind. Shorter ones are padded with 0 (False) to the longest."""
    first, *others = batches = with_same_parts(batches)
    if not others:
        return first

    def column(name: str):
        parts = [getattr(batch, name) for batch in batches]
        if not isinstance(parts[0], torch.Tensor):
            return parts[0]
        width = max(x.shape[1] for x in parts) if parts[0].dim() > 1 else 0
        return torch.cat([pad(x, (0, width - x.shape[1])) if x.dim() > 1 else x for x in parts])

    return replace(first, **{field.name: column(field.name) for field in fields(first)})
