"""The update: epochs over the buffer, minibatches, micro-batches; a step of the policy and one of the critic each."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from data.batching.micro_batch_plan import rank_plan
from ppo.config import PPOConfig
from ppo.kl import KL_ESTIMATORS, k3
from ppo.loss import (
    entropy_bonus,
    masked_sum,
    policy_clipped,
    policy_loss,
    policy_ratio,
    value_clipped,
    value_loss,
)
from ppo.pretrain import PretrainBatch, pretrain_loss
from ppo.types import Experience
from utils.distributed import rank, ranks_where, sum_ranks, world_size
from utils.engine.engine import TrainEngine
from utils.errors import UserError
from utils.models.load import training_mode
from utils.models.routers import ROUTER_METRICS
from utils.tensors import before, shift_to_next, to_device

Learner = tuple[TrainEngine, float, list[float]]  # with its learning rate, and the gradient norms of its steps
OnBad = Callable[[str, Experience], None]  # what is wrong with a minibatch, on all ranks alike
# Metrics that are not divided by the policy's response tokens: first word of the key -> whose `_tokens` instead.
COUNTED_APART = {"value": "critic", "pretrain": "pretrain", "router": "router"}


def refuse(problem: str, batch: Experience) -> None:
    """No bad minibatch is tolerated."""
    raise UserError(problem)


def update(
    policy: TrainEngine, critic: TrainEngine, experience: Experience, config: PPOConfig, step: int,
    lr: float, critic_lr: float, pretrain: Iterator[PretrainBatch] | None = None, on_bad: OnBad = refuse,
) -> dict[str, float]:  # fmt: skip
    """ppo_epochs passes over the buffer in seeded minibatches of batch_size. lr 0 leaves the policy alone.

    A minibatch whose loss or gradient is not finite, or explodes, makes no step: `on_bad` is told, and may raise.

    `experience` is the whole buffer, the same on every rank; each rank works on its token-balanced share of every
    minibatch, so the result does not depend on how many there are. Returns metrics, sums over ranks and tokens divided
    once.
    """
    sums: dict[str, float] = {}
    norms: dict[str, list[float]] = {"grad_norm_policy": [], "grad_norm_critic": []}
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    for engine in (policy, critic):
        training_mode(engine.module)
    for _ in range(config.ppo_epochs):
        for chosen in torch.randperm(len(experience), generator=generator).split(config.batch_size):
            minibatch = experience.rows(to_device(chosen, experience.sequences.device))
            learners = [(critic, critic_lr, norms["grad_norm_critic"])]
            problem, more = None, {}
            if lr > 0.0:
                more, problem = policy_backward(policy, minibatch, config, next(pretrain) if pretrain else None)
                learners.append((policy, lr, norms["grad_norm_policy"]))
            values, bad_values = critic_backward(critic, minibatch, config, lr > 0.0)
            problem = problem or bad_values
            if problem:
                drop(learners)
            else:
                problem = try_steps(learners)
            if problem:
                on_bad(problem, minibatch)
            else:
                add(sums, more | values)
    metrics = {key: sum(values) / len(values) for key, values in norms.items() if values}
    tokens = {name: max(sums.pop(f"{name}_tokens", 0.0), 1.0) for name in ("policy", *COUNTED_APART.values())}
    for key, value in sums.items():
        metrics[key] = value / tokens[COUNTED_APART.get(key.split("_")[0], "policy")]
    return metrics


def drop(learners: list[Learner]) -> None:
    """Forgets their gradients. Collective."""
    for engine, *_ in learners:
        engine.drop_gradients()


def try_steps(learners: list[Learner]) -> str | None:
    """One optimizer step of each, or of none: then returns what is wrong. Norms of steps join the lists. Collective.

    The first one's step waits, its norm known, for those of the others.
    """
    (engine, lr, norms), *others = learners
    problem = None

    def others_step() -> bool:
        nonlocal problem
        problem = try_steps(others) if others else None
        return problem is None

    norm = engine.step(lr, others_step)
    if math.isfinite(norm):
        norms.append(norm)
    elif problem is None:
        drop(others)  # which were not asked
        ranks = engine.bad_gradients()
        problem = (
            f"the gradient of the {engine.name} is not finite, or beyond --explosion_limit (rank {ranks}); no weights "
            "were changed. Lower the learning rate, or look in metrics.jsonl for the quantity that ran away"
        )
    return problem


def add(sums: dict[str, float], more: dict[str, float]) -> None:
    """Adds numbers by name."""
    for key, value in more.items():
        sums[key] = sums.get(key, 0.0) + value


def shares(batch: Experience, max_tokens: int, joined: bool = False) -> Iterator[Experience]:
    """This rank's micro-batches of a global minibatch, each cut to its longest row; as many on every rank.

    Where other ranks have one more, it is a sample without response tokens: nothing to learn, no rank left waiting.
    """
    lengths = batch.attention_mask.sum(1).tolist()
    for rows, weight in rank_plan(lengths, max_tokens, world_size(), rank(), joined):
        longest = max(lengths[i] for i in rows)
        part = batch.rows(rows).map(lambda x, longest=longest: x[:, :longest])
        masks = {name: getattr(part, name) & bool(weight) for name in ("attention_mask", "response_mask")}
        yield replace(part, **masks)


def policy_backward(
    policy: TrainEngine, batch: Experience, config: PPOConfig, pretrain: PretrainBatch | None
) -> tuple[dict[str, float], str | None]:
    """Gradient of the policy's whole loss on one minibatch, the pre-training term included, in micro-batches.

    Each micro-batch's load-balancing loss of routers is weighted by its share of the minibatch's tokens, prompts
    included; the pre-training batch has none. Returns sums over tokens and ranks, and what is wrong with them.
    """
    num_tokens, routed_tokens = (float(mask.sum()) for mask in (batch.response_mask, batch.attention_mask))
    sums, coef = {}, policy.module.router_coef
    for part in shares(batch, config.micro_batch_tokens, policy.module.joins_rows):
        asked = {"routed": part.attention_mask} if coef else {}
        logprobs, entropy, *routers = policy(
            part.sequences, part.response_mask, config.temperature, config.use_entropy_loss, **asked
        )
        loss, more = policy_objective(part, logprobs, entropy, config, num_tokens)
        if coef:
            loss = loss + coef * routers[0][0] / routed_tokens
            more |= dict(zip(ROUTER_METRICS, routers[0].detach(), strict=True))
            more["router_tokens"] = part.attention_mask.sum()
        policy.backward(loss)
        add(sums, more)
    if pretrain is not None:
        add(sums, pretrain_loss(policy, pretrain, config.ppo_pretrain_loss_weight, config.micro_batch_tokens))
    return totals(sums, "policy", num_tokens, config)


def policy_objective(
    part: Experience, logprobs: torch.Tensor, entropy: torch.Tensor | None, config: PPOConfig, num_tokens: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(scalar loss of these samples, sums over their tokens for the metrics). logprobs, entropy: [batch, length]."""
    mask = part.response_mask
    clip = config.pg_clip if config.use_policy_loss_clip else 0.0
    surrogate = policy_loss(logprobs, part.old_logprobs, part.advantages, mask, clip, num_tokens)
    loss = surrogate
    if config.kl_in == "loss" and config.kl_penalty_weight:
        kl = KL_ESTIMATORS[config.kl_estimator](logprobs, part.ref_logprobs)
        loss = loss + config.kl_penalty_weight * masked_sum(kl, mask) / num_tokens
    if config.use_entropy_loss:
        loss = loss - config.entropy_loss_weight * entropy_bonus(entropy, mask, config.entropy_clip, num_tokens)
    with torch.no_grad():
        ratio = policy_ratio(logprobs, part.old_logprobs, mask)
        sums = {
            "policy_loss": surrogate.detach() * num_tokens,
            "approx_kl": masked_sum(k3(part.old_logprobs, logprobs), mask),
            "clip_fraction": masked_sum(policy_clipped(ratio, part.advantages, config.pg_clip).float(), mask),
            "ratio_mean": masked_sum(ratio, mask),
        }
    return loss, sums


def critic_backward(
    critic: TrainEngine, batch: Experience, config: PPOConfig, clipped: bool = True
) -> tuple[dict[str, float], str | None]:
    """Gradient of the value loss on one minibatch, in micro-batches. Returns what `policy_backward` does.

    clipped: False while only the critic trains, as the clip would hold its values where they are; there is no
    value_clip_fraction then.
    """
    num_tokens = float(batch.response_mask.sum())
    clip = config.value_clip if config.use_critic_loss_clip and clipped else 0.0
    sums = {}
    for part in shares(batch, config.micro_batch_tokens, critic.module.joins_rows):
        values = shift_to_next(critic(part.sequences, before(part.response_mask)))
        loss = value_loss(values, part.old_values, part.returns, part.response_mask, clip, num_tokens)
        critic.backward(config.vf_loss_weight * loss)
        with torch.no_grad():
            more = {"value_loss": loss.detach() * num_tokens}
            if clipped:
                cut = value_clipped(values, part.old_values, part.returns, config.value_clip).float()
                more["value_clip_fraction"] = masked_sum(cut, part.response_mask)
            add(sums, more)
    return totals(sums, "critic", num_tokens, config)


def totals(
    sums: dict[str, torch.Tensor], name: str, num_tokens: float, config: PPOConfig
) -> tuple[dict[str, float], str | None]:
    """(sums over ranks, as floats; what is wrong with them, the same on every rank). Collective."""
    own = torch.stack([value.float() for value in sums.values()])
    total = dict(zip(sums, sum_ranks(own).tolist(), strict=True))
    limit = config.explosion_limit * max(num_tokens, 1.0)
    known = total | {f"{name}_tokens": num_tokens}
    bad = [key for key, value in total.items() if not abs(value) <= limit]
    if not bad:
        return known, None
    # All ranks know the totals, so all come here, or none.
    ranks = ranks_where(not bool((own.abs() <= limit).all()))
    value = total[bad[0]] / max(num_tokens, 1.0)
    what = f"beyond --explosion_limit ({value:g})" if math.isfinite(value) else "not finite"
    return known, (
        f"the loss of the {name} is {what}; no weights were changed ({bad[0]}, rank {ranks}). Lower "
        "the learning rate, or look in metrics.jsonl for the quantity that ran away"
    )
