"""The contrastive term of Part II: two views of each pair under different dropout know each other among all pairs.

Features are the difference of the last states of the better and the worse answer. The negatives of a pair are all
other pairs of the optimizer step, whatever the micro-batches and ranks: a first pass without gradients makes all
features, the loss and its gradient by them; the second pass, with the same dropout, sends that gradient on (gradient
caching, arXiv 2101.06983). So no graph of more than one micro-batch is held.
"""

import random
from collections.abc import Callable
from dataclasses import replace

import torch

from reward.batches import Comparison, Pull, pair_index, ranges_of
from reward.forward import Plan, read_answers
from reward.loss import simcse_losses
from utils.distributed import sum_ranks
from utils.engine.engine import TrainEngine


def pair_features(states: torch.Tensor, items: list[Comparison]) -> torch.Tensor:
    """Both views' features of every pair. states: [2, answers, hidden] -> [pairs, 2, hidden]."""
    index = pair_index(items).to(states.device)
    return (states[:, index.better] - states[:, index.worse]).transpose(0, 1)


def contrast_sum(states: torch.Tensor, items: list[Comparison]) -> torch.Tensor:
    """The summed loss of these items' pairs, as `with_pulls` found it; the gradient goes on through `states`."""
    losses, gradient = (torch.cat([getattr(item.pull, name) for item in items]) for name in ("losses", "gradient"))
    pulled = (pair_features(states, items) * gradient).sum()
    return losses.sum() + pulled - pulled.detach()


@torch.no_grad()
def with_pulls(
    engine: TrainEngine,
    items: list[Comparison],
    plan: Plan,
    length: Callable[[Comparison], int],
    temperature: float,
    seeds: random.Random,
) -> list[Comparison]:
    """The items of a step's whole batch, each with its `pull`: the first pass. Collective.

    plan, length: as the step itself uses them, so that both passes have the same forwards; seeds: of their dropout.
    """
    pairs, own_seeds, features = ranges_of(len(item.pairs) for item in items), [0] * len(items), None
    for part, weight in plan([length(item) for item in items]):
        seed, members = seeds.getrandbits(32), [items[i] for i in part]
        views = pair_features(read_answers(engine, members, dropout_seed=seed).states, members)
        if features is None:
            features = views.new_zeros(pairs[-1].stop, *views.shape[1:])
        if weight:  # else it only keeps another rank company
            features[[pair for i in part for pair in pairs[i]]] = views
            own_seeds = [seed if i in part else old for i, old in enumerate(own_seeds)]
    features = sum_ranks(features).requires_grad_()
    with torch.enable_grad():
        losses = simcse_losses(*features.unbind(1), temperature)
        (gradient,) = torch.autograd.grad(losses.sum(), features)
    losses = losses.detach()
    return [
        replace(item, pull=Pull(losses[places.start : places.stop], gradient[places.start : places.stop], seed))
        for item, places, seed in zip(items, pairs, own_seeds, strict=True)
    ]
