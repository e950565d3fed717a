"""The gap between the distribution of another engine's samples and the policy's: its size, and weights that correct it.

Per-token tensors are [batch, length]; `sampler_logprobs` as in `SampledRollout`, `old_logprobs` as in `Scores`.
"""

import math

import torch

from ppo.kl import k3
from ppo.types import Rollout, SampledRollout, Scores
from utils.tensors import masked_mean

# Default of --sampler_kl_limit by --dtype, nats per token at temperature 1, from benchmarks/README.md: about five times
# what rounding explains. In fp32 that is vLLM's attention on a GPU, which multiplies in TF32.
KL_LIMITS = {"fp32": 5e-5, "bf16": 0.02}


def gap_metrics(
    sampler_logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns sampler_kl, sampler_gap_mean and sampler_gap_max over response tokens: scalars in nats.

    sampler_kl: the estimate k3 of KL(sampler ‖ policy) per token, from samples of the sampler. It is not finite if one
    of the log-probabilities is not. The others: mean and largest absolute difference of log-probabilities.
    """
    gap = (old_logprobs - sampler_logprobs).abs().masked_fill(~mask, 0.0)
    return {
        "sampler_kl": masked_mean(k3(sampler_logprobs, old_logprobs), mask),
        "sampler_gap_mean": masked_mean(gap, mask),
        "sampler_gap_max": gap.amax(),
    }


def importance_weights(
    sampler_logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor, kind: str, cap: float
) -> torch.Tensor:
    """Returns the factor of each response token's policy loss, 0 elsewhere. r = exp(old - sampler) per token.

    truncate: min(r, cap) (TIS: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training"). mask_token: r inside [1 / cap, cap], else 0 (IcePop: arXiv 2510.18855). mask_sequence: 1 for all tokens
    of a response if the geometric mean of their r is inside, else 0 (Geo-RS: Liu, Li et al. 2025, "When Speed Kills
    Stability"; verl: seq_mean_k1 without weights). Log-probabilities have to be finite (`sampler_problem`).
    """
    log_ratio = (old_logprobs - sampler_logprobs).masked_fill(~mask, 0.0)
    ratio, limit = log_ratio.exp(), math.log(cap)
    if kind == "truncate":
        weights = ratio.clamp(max=cap)
    elif kind == "mask_token":
        weights = torch.where(log_ratio.abs() <= limit, ratio, 0.0)
    else:
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        weights = (mean.abs() <= limit).float().expand_as(ratio)
    return weights.masked_fill(~mask, 0.0)


def weight_metrics(weights: torch.Tensor, mask: torch.Tensor, cap: float) -> dict[str, torch.Tensor]:
    """Returns the mean weight of response tokens, and the share of them whose ratio was truncated or masked."""
    changed = (weights == 0.0) | (weights >= cap)
    return {"sampler_weight_mean": masked_mean(weights, mask), "sampler_truncated_fraction": masked_mean(changed, mask)}


def sampler_problem(rollout: Rollout, scores: Scores, sampler, config, temperature: float) -> str | None:
    """Describes a gap above --sampler_kl_limit, or one that is not finite; None if the samples are the policy's.

    rollout, scores: of all ranks, so that all find the same. `sampler.explain()`, which is collective, compares the
    weights again and returns a sentence that names the first tensor that differs, or None.
    """
    if not isinstance(rollout, SampledRollout):
        return None
    gap = gap_metrics(rollout.sampler_logprobs, scores.old_logprobs, rollout.response_mask)
    kl, limit = float(gap["sampler_kl"]), config.sampler_kl_limit
    if limit is None:  # rounding of logits counts more at a low temperature
        limit = KL_LIMITS[config.dtype] / min(1.0, temperature)
    if kl <= limit:  # False for NaN
        return None
    cause = sampler.explain() or "all weights were equal before it sampled"
    return (
        f"vLLM samples from another distribution than the policy's: sampler_kl is {kl:.3g} nats per token "
        f"(--sampler_kl_limit {limit:g}), sampler_gap_max {float(gap['sampler_gap_max']):.3g} nats; {cause}. "
        "--rollout_engine own samples without vLLM"
    )
