"""The update: epochs over the buffer, minibatches, micro-batches; a step of the policy and one of the critic each."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from data.shares import rank_plan
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
from utils.distributed import any_rank, rank, sum_ranks, world_size
from utils.engine import TrainEngine
from utils.errors import UserError
from utils.tensors import shift_to_next


def update(
    policy: TrainEngine, critic: TrainEngine, experience: Experience, config: PPOConfig, step: int,
    lr: float, critic_lr: float, pretrain: Iterator[PretrainBatch] | None = None,
) -> dict[str, float]:  # fmt: skip
    """ppo_epochs passes over the buffer in seeded minibatches of batch_size. lr 0 leaves the policy alone.

    `experience` is the whole buffer, the same on every rank; each rank works on its token-balanced share of every
    minibatch, so the result does not depend on how many there are. Returns metrics, sums over ranks and tokens divided
    once.
    """
    sums: dict[str, float] = {"policy_tokens": 0.0, "critic_tokens": 0.0}
    norms: dict[str, list[float]] = {"grad_norm_policy": [], "grad_norm_critic": []}
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    for _ in range(config.ppo_epochs):
        for chosen in torch.randperm(len(experience), generator=generator).split(config.batch_size):
            minibatch = experience.rows(chosen.to(experience.sequences.device))
            if lr > 0.0:
                add(sums, policy_backward(policy, minibatch, config, next(pretrain) if pretrain else None))
            add(sums, critic_backward(critic, minibatch, config))
            if lr > 0.0:  # not before both losses are known to be finite
                norms["grad_norm_policy"].append(policy.step(lr))
            norms["grad_norm_critic"].append(critic.step(critic_lr))
    metrics = {key: sum(values) / len(values) for key, values in norms.items() if values}
    tokens = {"policy": max(sums.pop("policy_tokens"), 1.0), "critic": max(sums.pop("critic_tokens"), 1.0)}
    pretrain_tokens = max(sums.pop("pretrain_tokens", 0.0), 1.0)
    for key, value in sums.items():
        metrics[key] = value / (pretrain_tokens if key == "pretrain_loss" else tokens[_model_of(key)])
    return metrics


def _model_of(key: str) -> str:
    return "critic" if key.startswith("value") else "policy"


def add(sums: dict[str, float], more: dict[str, float]) -> None:
    """Adds numbers by name."""
    for key, value in more.items():
        sums[key] = sums.get(key, 0.0) + value


def shares(batch: Experience, max_tokens: int) -> Iterator[Experience]:
    """This rank's micro-batches of a global minibatch, each cut to its longest row; as many on every rank.

    Where other ranks have one more, it is a sample without response tokens: nothing to learn, no rank left waiting.
    """
    lengths = batch.attention_mask.sum(1).tolist()
    for rows, weight in rank_plan(lengths, max_tokens, world_size(), rank()):
        longest = max(lengths[i] for i in rows)
        part = batch.rows(rows).map(lambda x, longest=longest: x[:, :longest])
        yield replace(part, response_mask=part.response_mask & bool(weight))


def policy_backward(
    policy: TrainEngine, batch: Experience, config: PPOConfig, pretrain: PretrainBatch | None
) -> dict[str, float]:
    """Gradient of the policy's whole loss on one minibatch, the pre-training term included, in micro-batches.

    Returns sums over tokens and ranks. Raises UserError on all ranks when a loss is not finite.
    """
    policy.module.train()
    num_tokens = float(batch.response_mask.sum())
    sums = {}
    for part in shares(batch, config.micro_batch_tokens):
        logprobs, entropy = policy(part.sequences, part.response_mask, config.temperature)
        loss, more = policy_objective(part, logprobs, entropy, config, num_tokens)
        policy.backward(loss)
        add(sums, more)
    if pretrain is not None:
        add(sums, pretrain_loss(policy, pretrain, config.ppo_pretrain_loss_weight, config.micro_batch_tokens))
    return finite_totals(sums, "policy") | {"policy_tokens": num_tokens}


def policy_objective(
    part: Experience, logprobs: torch.Tensor, entropy: torch.Tensor, config: PPOConfig, num_tokens: float
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


def critic_backward(critic: TrainEngine, batch: Experience, config: PPOConfig) -> dict[str, float]:
    """Gradient of the value loss on one minibatch, in micro-batches. Returns and raises as `policy_backward` does."""
    critic.module.train()
    num_tokens = float(batch.response_mask.sum())
    clip = config.value_clip if config.use_critic_loss_clip else 0.0
    sums = {}
    for part in shares(batch, config.micro_batch_tokens):
        values = shift_to_next(critic(part.sequences, part.attention_mask))
        loss = value_loss(values, part.old_values, part.returns, part.response_mask, clip, num_tokens)
        critic.backward(config.vf_loss_weight * loss)
        with torch.no_grad():
            clipped = value_clipped(values, part.old_values, part.returns, config.value_clip).float()
            add(
                sums,
                {
                    "value_loss": loss.detach() * num_tokens,
                    "value_clip_fraction": masked_sum(clipped, part.response_mask),
                },
            )
    return finite_totals(sums, "critic") | {"critic_tokens": num_tokens}


def finite_totals(sums: dict[str, torch.Tensor], name: str) -> dict[str, float]:
    """Sums over ranks, as floats. Raises UserError on all ranks, before any optimizer step, when one is not finite."""
    stacked = torch.stack([value.float() for value in sums.values()])
    if any_rank(not bool(torch.isfinite(stacked).all()), stacked.device):
        raise UserError(
            f"the loss of the {name} is not finite; its weights were not changed. Lower the learning rate, "
            "or look in metrics.jsonl for the quantity that ran away"
        )
    return dict(zip(sums, sum_ranks(stacked).tolist(), strict=True))
