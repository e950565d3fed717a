"""From scores to what the update learns from: shaped scores, token rewards, advantages. And the rollout's metrics."""

from dataclasses import replace

import torch

from ppo.advantages import gae
from ppo.config import PPOConfig
from ppo.kl import KL_ESTIMATORS, k1
from ppo.rewards import shape_scores, token_rewards
from ppo.types import Experience, Rollout, Scores
from utils.distributed import ranks_where
from utils.errors import UserError
from utils.moments import RunningMoments
from utils.tensors import masked_mean, whiten


def make_experience(rollout: Rollout, scores: Scores, moments: RunningMoments, config: PPOConfig) -> Experience:
    """The whole buffer (all ranks' samples, in the same order everywhere) -> Experience [samples, length].

    `moments` takes in these scores first: the buffer is normalised with one set of statistics, itself included.
    """
    check_scores(scores.scores, config.explosion_limit)
    moments.update(scores.scores)
    missing_eos = torch.where(rollout.ended, 0.0, -config.missing_eos_penalty)
    clip = config.reward_clip if config.use_reward_clip else 0.0
    shaped = shape_scores(scores.scores, moments, config.use_reward_norm, config.use_reward_scaling, clip, missing_eos)
    mask = rollout.response_mask
    kl = KL_ESTIMATORS[config.kl_estimator](scores.old_logprobs, scores.ref_logprobs)
    kl_coef = config.kl_penalty_weight if config.kl_in == "reward" else 0.0
    rewards = token_rewards(shaped, kl, mask, kl_coef)
    columns = (rollout.sequences, rollout.attention_mask, mask, scores.old_logprobs, scores.ref_logprobs)
    values = scores.old_values
    return with_values(Experience(*columns, values, rewards, advantages=values, returns=values), values, config)


def with_values(experience: Experience, old_values: torch.Tensor, config: PPOConfig) -> Experience:
    """The experience with these values of the critic, and the advantages and returns that follow from them.

    old_values: [samples, length].
    """
    mask = experience.response_mask
    advantages, returns = gae(experience.rewards, old_values, mask, config.gamma, config.lam)
    if config.use_advantage_norm:
        advantages = whiten(advantages, mask)
    if config.use_advantage_clip:
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
    return replace(experience, old_values=old_values, advantages=advantages, returns=returns)


def value_scale(experience: Experience, config: PPOConfig) -> tuple[float, float]:
    """(scale, shift) that give the values the returns' mean, and --critic_init_scale of the returns' deviation.

    Returns here are sums of the rewards to come (λ = 1), which do not depend on the values. A scale of 1 where either
    deviation is 0.
    """
    mask = experience.response_mask
    returns = gae(experience.rewards, experience.old_values, mask, config.gamma, lam=1.0)[1][mask]
    values = experience.old_values[mask]
    deviations = [float(x.std(correction=0)) for x in (returns, values)]
    scale = config.critic_init_scale * deviations[0] / deviations[1] if all(deviations) else 1.0
    return scale, float(returns.mean()) - scale * float(values.mean())


def score_problem(scores: torch.Tensor, limit: float, own: torch.Tensor | None = None) -> str | None:
    """What is wrong with the first response whose score is not finite or beyond ± limit. scores: [batch], all ranks'.

    own: this rank's part of them: then the ranks of bad ones are named, which all ranks have to ask for together.
    """
    wrong = (~(scores.abs() <= limit)).nonzero()
    if not len(wrong):
        return None
    place = int(wrong[0])
    what = "not finite" if not torch.isfinite(scores[place]) else f"{float(scores[place]):g}, beyond --explosion_limit"
    if own is not None:
        what += f" (rank {ranks_where(not bool((own.abs() <= limit).all()))})"
    return f"the score of response {place} of this step is {what}; look at what the reward model or --reward_fn does"


def check_scores(scores: torch.Tensor, limit: float, own: torch.Tensor | None = None) -> None:
    """Raises UserError with the `score_problem`, if there is one."""
    if problem := score_problem(scores, limit, own):
        raise UserError(problem)


def rollout_metrics(rollout: Rollout, scores: Scores) -> dict[str, float]:
    """Of all samples: score, KL in nats a response, length in tokens, perplexities, entropy in nats a token."""
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
    return as_floats(values | member_metrics(scores))


def as_floats(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Converts scalars to Python floats, with one copy from the device for all of them."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def member_metrics(scores: Scores) -> dict[str, torch.Tensor]:
    """Of several reward models, the mean of each and how far apart they are; of those that encode anew, what they cut.

    Nothing for a single reward model that reads the policy's ids.
    """
    values, members = {}, scores.member_scores
    if members.shape[1] > 1:
        values |= {f"score_mean_{i}": column.mean() for i, column in enumerate(members.unbind(1), start=1)}
        values["score_disagreement"] = members.std(1, correction=0).mean()
    if scores.truncated.shape[1]:
        values["reward_truncated_fraction"] = scores.truncated.float().mean()
    return values


def negative_kl_warning(rollout: Rollout, scores: Scores) -> str | None:
    """A sentence when the mean KL of this buffer is below 0 by more than three standard errors: it cannot be, so

    sampling and scoring disagree (or the sampler's top-p and penalty, which scoring ignores, are strong).
    """
    kl = k1(scores.old_logprobs, scores.ref_logprobs).sum(1)
    if len(kl) < 32 or float(kl.mean() + 3 * kl.std() / len(kl) ** 0.5) >= 0:
        return None
    return f"warning: mean KL {float(kl.mean()):.2f} is below 0: what is sampled is not what is scored"


def experience_metrics(experience: Experience) -> dict[str, float]:
    """Of all response tokens of the buffer."""
    mask = experience.response_mask
    errors = (experience.returns - experience.old_values)[mask]
    returns = experience.returns[mask]
    advantages = experience.advantages[mask]
    values = {
        "advantage_mean": advantages.mean(),
        "advantage_std": advantages.std(correction=0),
        "return_mean": returns.mean(),
        "value_mean": experience.old_values[mask].mean(),
        "explained_variance": 1.0 - errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-8),
    }
    return as_floats(values)
