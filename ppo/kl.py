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
