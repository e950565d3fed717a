"""Estimators of KL(policy ‖ reference) from samples of the policy, one number per token (Schulman 2020)."""

import torch


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """log π - log π_ref: unbiased, may be negative; used in Part I eq. 19. Any shape -> same shape."""
    return logprobs - ref_logprobs


def k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """½ (log π - log π_ref)²: biased, never negative; its gradient is that of the KL. Any shape -> same shape."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """exp(d) - 1 - d with d = log π_ref - log π: unbiased, never negative. Any shape -> same shape."""
    difference = ref_logprobs - logprobs
    return torch.expm1(difference) - difference


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def adapted(coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """Returns the next weight of the KL penalty (Ziegler et al. 2019, arXiv 1909.08593, §2.2).

    kl: mean KL to the reference of the last `samples` responses, and its target, in nats per response. More responses
    than the horizon count as the horizon, so that the weight stays above 0.
    """
    error = min(0.2, max(-0.2, kl / target - 1.0))
    return coef * (1.0 + error * min(samples / horizon, 1.0))
