"""The contrastive loss of Part II (SimCSE) over all pairs of an optimizer step, with gradient caching.

The feature of a pair is the difference of the last states of the better and the worse answer; its two views differ by
dropout; its negatives are all other pairs of the step, on all ranks. A first pass without gradients computes features,
loss, and its gradient with respect to them, which the second pass, with the same dropout, backpropagates (arXiv
2101.06983). So only the graph of one micro-batch is in memory.
"""

import random
from collections.abc import Callable
from dataclasses import replace

import torch

from reward.batches import CachedGradient, Comparison, pair_index, row_ranges
from reward.forward import Plan, forward_answers
from reward.loss import simcse_losses
from utils.distributed import sum_ranks
from utils.engine.engine import TrainEngine


def pair_features(states: torch.Tensor, items: list[Comparison]) -> torch.Tensor:
    """Returns the features of both views of each pair. states: [2, answers, hidden] -> [pairs, 2, hidden]."""
    index = pair_index(items).to(states.device)
    return (states[:, index.better] - states[:, index.worse]).transpose(0, 1)


def contrastive_loss_sum(states: torch.Tensor, items: list[Comparison]) -> torch.Tensor:
    """Returns the cached summed loss of these items' pairs, with the cached gradient attached to `states`."""
    cached = [item.cached_gradient for item in items]
    losses, gradient = torch.cat([x.losses for x in cached]), torch.cat([x.gradient for x in cached])
    product = (pair_features(states, items) * gradient).sum()
    return losses.sum() + product - product.detach()


@torch.no_grad()
def cache_gradients(
    engine: TrainEngine, items: list[Comparison], plan: Plan, length: Callable[[Comparison], int], temperature: float,
    seeds: random.Random,
) -> list[Comparison]:  # fmt: skip
    """Runs the first pass over a step's global batch and returns its items with their `cached_gradient`. Collective.

    plan, length: as in the second pass, so that both have the same micro-batches. seeds: source of dropout seeds.
    """
    pairs, own_seeds, features = row_ranges(len(item.pairs) for item in items), [0] * len(items), None
    for part, weight in plan([length(item) for item in items]):
        seed, members = seeds.getrandbits(32), [items[i] for i in part]
        views = pair_features(forward_answers(engine, members, dropout_seed=seed).states, members)
        if features is None:
            features = views.new_zeros(pairs[-1].stop, *views.shape[1:])
        if weight:  # 0: dummy forward pass, so that all ranks run the same collectives
            features[[pair for i in part for pair in pairs[i]]] = views
            own_seeds = [seed if i in part else old for i, old in enumerate(own_seeds)]
    features = sum_ranks(features).requires_grad_()
    with torch.enable_grad():
        losses = simcse_losses(*features.unbind(1), temperature)
        (gradient,) = torch.autograd.grad(losses.sum(), features)
    losses, parts = losses.detach(), [slice(rows.start, rows.stop) for rows in pairs]
    return [
        replace(item, cached_gradient=CachedGradient(losses[part], gradient[part], seed))
        for item, part, seed in zip(items, parts, own_seeds, strict=True)
    ]
