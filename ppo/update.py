"""The update: epochs over the buffer, minibatches, micro-batches; one optimizer step of every model per minibatch."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from data.batching.micro_batch_plan import rank_plan
from ppo.config import PPOConfig
from ppo.epochs import CRITIC, POLICY, optimizer_steps
from ppo.kl import KL_ESTIMATORS, k3
from ppo.loss import (
    entropy_bonus,
    masked_sum,
    policy_clipped,
    policy_loss,
    policy_ratio,
    row_weights,
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
from utils.sums import Sums, add, means
from utils.tensors import before, shift_to_next, to_device

OnBad = Callable[[str, Experience], None]  # what is wrong with a minibatch, the same on all ranks
ADVICE = "no weights were changed. Lower the learning rate, or look in metrics.jsonl for the quantity that diverged"


@dataclass(frozen=True)
class Learner:
    """A model that the update trains. backward(minibatch) -> (this rank's share of the loss, its sums for metrics)."""

    engine: TrainEngine
    lr: float
    backward: Callable[[Experience], tuple[torch.Tensor, Sums]]


def refuse(problem: str, batch: Experience) -> None:
    """Raises UserError: no bad minibatch is tolerated."""
    raise UserError(problem)


def update(
    policy: TrainEngine, critic: TrainEngine | None, experience: Experience, config: PPOConfig, step: int,
    lr: float, critic_lr: float, pretrain: Iterator[PretrainBatch] | None = None, on_bad: OnBad = refuse,
    kl_coef: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Trains for some passes over the buffer (`optimizer_steps`) in seeded minibatches of batch_size; returns metrics.

    lr 0 trains the critic only; critic None trains the policy only. `experience` is the whole buffer, the same on every
    rank. kl_coef: as for `policy_objective`. A minibatch with a loss or gradient beyond --explosion_limit makes no
    step; `on_bad` may raise.
    """
    learners = {}
    if lr > 0.0:

        def whole_policy_backward(batch: Experience) -> tuple[torch.Tensor, Sums]:
            return policy_backward(policy, batch, config, next(pretrain) if pretrain else None, kl_coef)

        learners[POLICY] = Learner(policy, lr, whole_policy_backward)
    if critic is not None:
        learners[CRITIC] = Learner(critic, critic_lr, lambda batch: critic_backward(critic, batch, config, lr > 0.0))
    for learner in learners.values():
        training_mode(learner.engine.module)
    sums: Sums = {}
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    num_batches = -(-len(experience) // config.batch_size)  # of one size; fewer rows if --reward_fn failed on some
    numbers = config.ppo_epochs, config.critic_epochs, config.critic_updates_per_policy_update
    for steps in optimizer_steps(*numbers, POLICY in learners, CRITIC in learners):
        for chosen in torch.randperm(len(experience), generator=generator).tensor_split(num_batches):
            minibatch = experience.rows(to_device(chosen, experience.sequences.device))
            for names in steps:
                trained = [learners[name] for name in names]
                found, problem = backward_all(trained, minibatch, config.explosion_limit)
                norms, problem = step_all(trained, problem)
                if problem:
                    on_bad(problem, minibatch)
                    break
                add(sums, norms | found)
    return means(sums)


def backward_all(learners: list[Learner], batch: Experience, limit: float) -> tuple[Sums, str | None]:
    """Adds the gradients of all losses on a minibatch. Collective.

    Returns (sums for metrics over all ranks, what is wrong with a loss, the same on all ranks).
    """
    losses, own = [], {}
    for learner in learners:
        loss, sums = learner.backward(batch)
        losses.append(loss)
        own |= sums
    scalars = [*losses, *itertools.chain(*own.values())]
    place = losses[0].device
    totals = sum_ranks(torch.stack([torch.as_tensor(x, dtype=torch.float32, device=place) for x in scalars])).tolist()
    pairs = totals[len(losses) :]
    sums = dict(zip(own, zip(pairs[::2], pairs[1::2], strict=True), strict=True))
    for learner, loss, total in zip(learners, losses, totals, strict=False):
        if not abs(total) <= limit:
            ranks = ranks_where(not abs(float(loss)) <= limit)  # all ranks know the totals, so all call this, or none
            what = f"beyond --explosion_limit ({total:g})" if math.isfinite(total) else "not finite"
            return sums, f"the loss of the {learner.engine.name} is {what} (rank {ranks}); {ADVICE}"
    return sums, None


def step_all(learners: list[Learner], problem: str | None = None) -> tuple[Sums, str | None]:
    """Makes one optimizer step of every model, or of none if there is a problem or a gradient is bad. Collective.

    Returns (gradient norms for metrics, what is wrong, the same on all ranks).
    """
    norms: Sums = {}
    for learner in learners if problem is None else ():
        name = learner.engine.name
        norms[f"grad_norm_{name}"] = (learner.engine.measure(), 1.0)
        if problem is None and not math.isfinite(norms[f"grad_norm_{name}"][0]):
            what = f"not finite, or beyond --explosion_limit (rank {ranks_where(learner.engine.bad_gradient())})"
            problem = f"the gradient of the {name} is {what}; {ADVICE}"
    for learner in learners:
        if problem is None:
            learner.engine.apply(learner.lr)
        else:
            learner.engine.drop_gradients()
    return norms, problem


def shares(batch: Experience, max_tokens: int, joined: bool = False) -> Iterator[Experience]:
    """Yields this rank's micro-batches of a global minibatch, each cut to its longest row; as many on every rank."""
    lengths = batch.attention_mask.sum(1).tolist()
    for rows, weight in rank_plan(lengths, max_tokens, world_size(), rank(), joined):
        longest = max(lengths[i] for i in rows)
        part = batch.rows(rows).map(lambda x, longest=longest: x[:, :longest] if x.dim() > 1 else x)
        masks = {name: getattr(part, name) & bool(weight) for name in ("attention_mask", "response_mask")}
        yield replace(part, **masks)


def policy_backward(
    policy: TrainEngine,
    batch: Experience,
    config: PPOConfig,
    pretrain: PretrainBatch | None,
    kl_coef: float | None = None,
) -> tuple[torch.Tensor, Sums]:
    """Adds the gradient of the policy's whole loss on one minibatch, the pre-training term included, in micro-batches.

    Returns this rank's share of (the loss, sums for metrics). The load-balancing loss of each micro-batch is weighted
    by its share of the minibatch's tokens, prompts included.
    """
    num_tokens, routed_tokens = (float(mask.sum()) for mask in (batch.response_mask, batch.attention_mask))
    total, sums, coef = 0.0, {}, policy.module.router_coef
    if config.loss_average != "token":
        rows = row_weights(batch.response_mask, batch.groups, config.loss_average, config.maxlen_res)
        batch = replace(batch, row_weights=rows)
    for part in shares(batch, config.micro_batch_tokens, policy.module.joins_rows):
        routed = {"routed": part.attention_mask} if coef else {}
        logprobs, entropy, *routers = policy(
            part.sequences, part.response_mask, config.temperature, config.use_entropy_loss, **routed
        )
        loss, more = policy_objective(part, logprobs, entropy, config, num_tokens, kl_coef)
        if coef:
            loss = loss + coef * routers[0][0] / routed_tokens
            tokens = part.attention_mask.sum()
            more |= {name: (x, tokens) for name, x in zip(ROUTER_METRICS, routers[0].detach(), strict=True)}
        policy.backward(loss)
        total = total + loss.detach()
        add(sums, more)
    if pretrain is not None:
        loss, more = pretrain_loss(policy, pretrain, config.ppo_pretrain_loss_weight, config.micro_batch_tokens)
        total = total + loss
        add(sums, more)
    return total, sums


def policy_objective(
    part: Experience,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    config: PPOConfig,
    num_tokens: float,
    kl_coef: float | None = None,
) -> tuple[torch.Tensor, Sums]:
    """Returns (scalar loss, sums for metrics) of these samples. logprobs, entropy: [batch, length].

    kl_coef: weight of the KL under --kl_in loss; None: --kl_penalty_weight.
    Weights do not change num_tokens: the mean of weight * surrogate over all samples of the sampler estimates the
    policy's mean; division by the sum of the weights, which differs between minibatches, would not.
    """
    mask, rows = part.response_mask, None if part.row_weights is None else part.row_weights[:, None]
    # w * min(ρ A, clip(ρ) A) = min(ρ w A, clip(ρ) w A) because w >= 0.
    advantages = part.advantages if part.weights is None else part.weights * part.advantages
    advantages = advantages if rows is None else rows * advantages
    clip = config.pg_clip if config.use_policy_loss_clip else 0.0
    clips = (config.pg_clip_high, config.dual_clip)
    surrogate = policy_loss(
        logprobs, part.old_logprobs, advantages, mask, clip, num_tokens, *clips, config.policy_ratio
    )
    loss = surrogate
    kl_coef = config.kl_penalty_weight if kl_coef is None else kl_coef
    if config.kl_in == "loss" and kl_coef:
        kl = KL_ESTIMATORS[config.kl_estimator](logprobs, part.ref_logprobs)
        loss = loss + kl_coef * masked_sum(kl if rows is None else rows * kl, mask) / num_tokens
    if config.use_entropy_loss:
        bonus = entropy_bonus(entropy, mask, config.entropy_clip, num_tokens, rows)
        loss = loss - config.entropy_loss_weight * bonus
    with torch.no_grad():
        ratio, tokens = policy_ratio(logprobs, part.old_logprobs, mask, config.policy_ratio), mask.sum()
        clipped = policy_clipped(ratio, advantages, config.pg_clip, *clips).float()
        if config.policy_ratio == "none":
            clipped = torch.zeros_like(clipped)
        sums = {
            "policy_loss": (surrogate * num_tokens, tokens),
            "approx_kl": (masked_sum(k3(part.old_logprobs, logprobs), mask), tokens),
            "clip_fraction": (masked_sum(clipped, mask), tokens),
            "ratio_mean": (masked_sum(ratio, mask), tokens),
        }
    return loss, sums


def critic_backward(
    critic: TrainEngine, batch: Experience, config: PPOConfig, clipped: bool = True
) -> tuple[torch.Tensor, Sums]:
    """Adds the gradient of the value loss on one minibatch. Returns what `policy_backward` does.

    clipped: False while only the critic trains: clipping would keep values near the old ones. In the head's unit.
    """
    num_tokens = float(batch.response_mask.sum())
    clip = config.value_clip if config.use_critic_loss_clip and clipped else 0.0
    total, sums = 0.0, {}
    for part in shares(batch, config.micro_batch_tokens, critic.module.joins_rows):
        mask = part.response_mask
        values = shift_to_next(critic(part.sequences, before(mask)))
        values, old, returns = (x / critic.module.score_scale for x in (values, part.old_values, part.returns))
        loss = value_loss(values, old, returns, mask, clip, num_tokens)
        critic.backward(config.vf_loss_weight * loss)
        with torch.no_grad():
            total, tokens = total + config.vf_loss_weight * loss, mask.sum()
            more = {"value_loss": (loss * num_tokens, tokens)}
            if clipped:
                cut = value_clipped(values, old, returns, config.value_clip).float()
                more["value_clip_fraction"] = (masked_sum(cut, mask), tokens)
            add(sums, more)
    return total, sums
