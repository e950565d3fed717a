"""From scores to experience: shaped scores, token rewards, advantages; metrics of the buffer."""

import math
from dataclasses import replace

import torch

from ppo.advantages import gae
from ppo.config import PPOConfig
from ppo.critic_metrics import critic_metrics, explained_variance, return_noise
from ppo.estimators import load_estimator
from ppo.kl import KL_ESTIMATORS, k1
from ppo.rewards import overlong_penalty, per_token, shape_scores, token_rewards
from ppo.sampler_gap import gap_metrics, importance_weights, weight_metrics
from ppo.types import Experience, Rollout, SampledRollout, Scores
from utils.distributed import ranks_where
from utils.errors import UserError
from utils.moments import RunningMoments
from utils.tensors import masked_mean, whiten


def make_experience(
    rollout: Rollout, scores: Scores, moments: RunningMoments, config: PPOConfig, kl_coef: float | None = None
) -> Experience:
    """Returns the experience of all ranks' `scored` samples, the same on every rank. First adds them to `moments`.

    kl_coef: weight of the KL under --kl_in reward; None: --kl_penalty_weight.
    """
    rollout, scores = scored(rollout, scores)
    lengths = rollout.response_mask.sum(1)
    raw = per_token(scores.scores, rollout.response_mask) if config.use_length_norm else scores.scores
    moments.update(raw)
    penalties = torch.where(rollout.ended, 0.0, -config.missing_eos_penalty)
    if config.overlong_buffer:
        limit = config.overlong_length or config.maxlen_res
        penalties = penalties + overlong_penalty(lengths, limit, config.overlong_buffer, config.overlong_penalty)
    clip = config.reward_clip if config.use_reward_clip else 0.0
    shaping = (moments, config.use_reward_norm, config.use_reward_scaling, clip)
    shaped = shape_scores(raw, *shaping, penalties)
    mask = rollout.response_mask
    kl = KL_ESTIMATORS[config.kl_estimator](scores.old_logprobs, scores.ref_logprobs)
    kl_coef = config.kl_penalty_weight if kl_coef is None else kl_coef
    rewards = token_rewards(shaped, kl, mask, kl_coef if config.kl_in == "reward" else 0.0)
    columns = (rollout.sequences, rollout.attention_mask, mask, scores.old_logprobs, scores.ref_logprobs)
    weights = None
    if isinstance(rollout, SampledRollout) and config.sampler_correction != "none":
        pair = (rollout.sampler_logprobs, scores.old_logprobs)
        weights = importance_weights(*pair, mask, config.sampler_correction, config.correction_cap)
    baselines = scores.baselines
    if baselines is not None:  # a greedy response that was cut has no penalty
        baselines = shape_scores(baselines, *shaping, torch.zeros_like(baselines))
    experience = Experience(*columns, None, rewards, rewards, None, weights, scores.groups, baselines=baselines)
    return with_values(experience, scores.old_values, config)


def scored(rollout: Rollout, scores: Scores) -> tuple[Rollout, Scores]:
    """Returns the samples without those to which --reward_fn gave no score. Raises UserError if there are no others."""
    if scores.failed is None or not scores.failed.any():
        return rollout, scores
    if scores.failed.all():
        counts = zip(scores.part_names, scores.parts.isnan().sum(0).tolist(), strict=True)
        named = ", ".join(f"{name} for {count}" for name, count in counts if count)
        raise UserError(
            f"--reward_fn scored none of {len(rollout)} answers ({named}): None means that one failed; see why "
            "in the function, or return a number"
        )
    return rollout.rows(~scores.failed), scores.rows(~scores.failed)


def with_values(experience: Experience, old_values: torch.Tensor | None, config: PPOConfig) -> Experience:
    """Returns the experience with these values [samples, length], and advantages and returns by the estimator."""
    mask = experience.response_mask
    advantages, returns = load_estimator(config.advantage_estimator)(
        rewards=experience.rewards, values=old_values, response_mask=mask, groups=experience.groups,
        gamma=config.gamma, lam=config.lam, critic_lam=config.critic_lam, length_alpha=config.length_alpha,
        baselines=experience.baselines,
    )  # fmt: skip
    if config.use_advantage_norm:
        advantages = whiten(advantages, mask)
    if config.use_advantage_clip:
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
    return replace(experience, old_values=old_values, advantages=advantages, returns=returns)


def value_scale(experience: Experience, config: PPOConfig) -> tuple[float, float]:
    """Returns (scale, shift) after which values have the returns' mean and --critic_init_scale times their deviation.

    Returns here are sums of future rewards (λ = 1), which do not depend on values. scale is 1 if a deviation is 0.
    """
    mask = experience.response_mask
    returns = gae(experience.rewards, experience.old_values, mask, config.gamma, lam=1.0)[1][mask]
    values = experience.old_values[mask]
    deviations = [float(x.std(correction=0)) for x in (returns, values)]
    scale = config.critic_init_scale * deviations[0] / deviations[1] if all(deviations) else 1.0
    return scale, float(returns.mean()) - scale * float(values.mean())


def score_problem(batch: Scores, limit: float, own: torch.Tensor | None = None) -> str | None:
    """Describes the first score that is not finite or beyond ± limit; None if all are fine. batch: of all ranks.

    own: this rank's scores, for a text that names the ranks with bad ones; collective if there are any.
    """
    found = _first_beyond(batch.scores, limit)
    if not found:
        greedy = batch.baselines is not None and _first_beyond(batch.baselines, limit)
        where = f"the greedy response beside response {greedy[0]}" if greedy else ""
        return f"the score of {where} is {greedy[1]}; check the reward model or --reward_fn" if greedy else None
    place, what = found
    if own is not None:
        what += f" (rank {ranks_where(not bool((own.abs() <= limit).all()))})"
    bad = ()
    if batch.parts is not None:  # here NaN is the function's own, since the answer has a score
        values = zip(batch.part_names, batch.parts[place].tolist(), strict=True)
        bad = [name for name, value in values if not abs(value) <= limit]
    named = f" ({', '.join(bad)})" if bad else ""
    return f"the score of response {place} of this step is {what}; check the reward model or --reward_fn{named}"


def _first_beyond(scores: torch.Tensor, limit: float) -> tuple[int, str] | None:
    """Returns (index, what it is) of the first score that is not finite or beyond ± limit, None if all are fine."""
    wrong = (~(scores.abs() <= limit)).nonzero()
    if not len(wrong):
        return None
    place, score = int(wrong[0]), float(scores[wrong[0]])
    return place, f"{score:g}, beyond --explosion_limit" if math.isfinite(score) else "not finite"


def rollout_metrics(rollout: Rollout, scores: Scores) -> dict[str, float]:
    """Metrics over all `scored` samples. Units: KL nats per response, length tokens, entropy nats per token."""
    failed = scores.failed
    rollout, scores = scored(rollout, scores)
    mask = rollout.response_mask
    deviation = scores.scores.std(correction=0)
    values = {
        "score_mean": scores.scores.mean(),
        "score_std": deviation,
        "kl_ref": k1(scores.old_logprobs, scores.ref_logprobs).sum(1).mean(),
        "response_length": mask.sum(1).float().mean(),
        "perplexity": torch.exp(-masked_mean(scores.old_logprobs, mask)),
        "perplexity_ref": torch.exp(-masked_mean(scores.ref_logprobs, mask)),
        "entropy": masked_mean(scores.entropy, mask),
        "eos_fraction": rollout.ended.float().mean(),
    }
    if isinstance(rollout, SampledRollout):
        values |= gap_metrics(rollout.sampler_logprobs, scores.old_logprobs, mask)
    if failed is not None:
        values["reward_failed_fraction"] = failed.float().mean()
    return as_floats(values | member_metrics(scores) | part_metrics(scores))


def as_floats(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Converts scalars to Python floats, with one copy from the device for all of them."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def member_metrics(scores: Scores) -> dict[str, torch.Tensor]:
    """Metrics of several reward models: mean of each, disagreement; share of dialogues that were truncated for one."""
    values, members = {}, scores.member_scores
    if members.shape[1] > 1:
        values |= {f"score_mean_{i}": column.mean() for i, column in enumerate(members.unbind(1), start=1)}
        values["score_disagreement"] = members.std(1, correction=0).mean()
    if scores.truncated.shape[1]:
        values["reward_truncated_fraction"] = scores.truncated.float().mean()
    return values


def part_metrics(scores: Scores) -> dict[str, torch.Tensor]:
    """Returns the mean of each function of --reward_fn, and of each of its parts, over the samples that have it."""
    found = zip(scores.part_names, () if scores.parts is None else scores.parts.T, strict=True)
    return {name: column.nanmean() for name, column in found if not column.isnan().all()}


def negative_kl_warning(scores: Scores) -> str | None:
    """Returns a warning if this buffer's mean KL is below 0 by more than three standard errors, else None."""
    kl = k1(scores.old_logprobs, scores.ref_logprobs).sum(1)
    if len(kl) < 32 or float(kl.mean() + 3 * kl.std() / len(kl) ** 0.5) >= 0:
        return None
    return f"warning: mean KL {float(kl.mean()):.2f} is below 0: sampling and scoring use different distributions"


def experience_metrics(experience: Experience, config: PPOConfig) -> dict[str, float]:
    """Metrics over all response tokens of the buffer; those of values and returns with a critic only."""
    mask = experience.response_mask
    advantages = experience.advantages[mask]
    metrics = {"advantage_mean": advantages.mean(), "advantage_std": advantages.std(correction=0)}
    if experience.returns is not None:
        returns, values = experience.returns[mask], experience.old_values[mask]
        metrics |= {"return_mean": returns.mean(), "value_mean": values.mean()}
        metrics["explained_variance"] = explained_variance(returns, values)
        metrics |= critic_metrics(experience.returns, experience.old_values, mask)
        if config.num_responses_per_prompt > 1:
            noise = return_noise(experience.rewards, mask, experience.groups, config.gamma)
            metrics |= {} if noise is None else {"return_noise": noise}
    if experience.weights is not None:
        metrics |= weight_metrics(experience.weights, mask, config.correction_cap)
    return as_floats(metrics)
