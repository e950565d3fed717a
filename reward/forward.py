"""Forward passes of the reward model over comparisons."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.batching.collate import pad
from reward.batches import Comparison, row_ranges
from reward.metrics import ScoredItems
from reward.model import last_scores
from utils.distributed import sum_ranks
from utils.engine.engine import TrainEngine, device
from utils.tensors import to_device

Plan = Callable[[list[int]], Iterable[tuple[list[int], float]]]  # lengths -> (indices, weight) per micro-batch


@dataclass(frozen=True)
class RewardOutput:
    """Outputs for all answers of a batch, in order. scores: [answers]. nll: summed over the tokens of the best answers.

    states: last states under two dropout masks, [2, answers, hidden], if a dropout seed was given; scores and nll are
    then those of the first.
    """

    scores: torch.Tensor
    nll: torch.Tensor | None = None
    states: torch.Tensor | None = None


def forward_answers(
    engine: Callable, items: list[Comparison], with_lm: bool = False, dropout_seed: int | None = None
) -> RewardOutput:
    """Runs one forward pass over all answers of `items`. engine: a ScalarModel, or the engine around it.

    dropout_seed: run each answer twice with different dropout; the global random state does not change.
    """
    ids, mask = pad([answer for item in items for answer in item.answers], 0)
    nll_mask = best_answer_mask(items, mask) if with_lm else None
    count, twice = len(ids), dropout_seed is not None
    if twice:
        ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
        nll_mask = F.pad(nll_mask, (0, 0, 0, count)) if with_lm else None
    ids, mask, nll_mask = (x if x is None else to_device(x, device()) for x in (ids, mask, nll_mask))
    with _random(dropout_seed):
        values, *extras = _tuple(engine(ids, mask, nll_mask, with_states=twice))
    states = extras.pop().unflatten(0, (2, count)) if twice else None
    return RewardOutput(last_scores(values, mask)[:count], extras[0] if with_lm else None, states)


def best_answer_mask(items: list[Comparison], mask: torch.Tensor) -> torch.Tensor:
    """Returns a bool mask [answers, length] that is True at the tokens of each comparison's best answer."""
    starts, stops = [], []
    for item in items:
        starts += [item.prompt_length] * len(item.answers)
        lengths = enumerate(item.answer_lengths)
        stops += [item.prompt_length + length if place == item.best else 0 for place, length in lengths]
    starts, stops = (torch.tensor(x, device=mask.device)[:, None] for x in (starts, stops))
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places >= starts) & (places < stops)


@torch.no_grad()
def score_comparisons(
    engine: TrainEngine, items: list[Comparison], plan: Plan, with_lm: bool = False
) -> tuple[ScoredItems, float]:
    """Returns (scores of all answers, summed NLL of the best answers or 0) on all ranks, in eval mode. Collective."""
    engine.module.eval()
    rows = row_ranges(len(item.answers) for item in items)
    scores, nll = torch.zeros(rows[-1].stop, device=device()), torch.zeros(1, device=device())
    joined = engine.module.trains_joined
    for part, weight in plan([item.tokens if joined else item.padded_tokens for item in items]):
        reading = forward_answers(engine, [items[i] for i in part], with_lm)
        if weight:  # 0: dummy forward pass, so that all ranks run the same collectives
            scores[[row for i in part for row in rows[i]]] = reading.scores
            nll += reading.nll if with_lm else 0.0
    total = sum_ranks(torch.cat([scores, nll])).cpu()
    return ScoredItems(items, total[:-1]), float(total[-1])


def _tuple(output: torch.Tensor | tuple) -> tuple:
    return output if isinstance(output, tuple) else (output,)


@contextlib.contextmanager
def _random(seed: int | None):
    """Context with the random numbers of `seed`; None: without any change."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device()] if device().type == "cuda" else []):
        torch.manual_seed(seed)
        yield
