"""Advantage estimators. All tensors are float32 [batch, length] unless stated; results are 0 outside the response.

An estimator is called with the keywords rewards, values, response_mask, groups [batch] int64 (responses to one prompt
have the same number), gamma and lam, and returns (advantages, returns). It names what it needs and ignores the rest.
One that names `values` has a critic, which learns `returns`; the others return None. It may also name `critic_lam`,
`length_alpha`, or `baselines` [batch], the scores of greedy responses. R_i: sum of the rewards of response i.
"""

from collections.abc import Callable

import torch

from utils.tensors import sum_by_group

Estimate = tuple[torch.Tensor, torch.Tensor | None]


def gae(
    rewards: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor, gamma: float, lam: float | torch.Tensor,
    **_,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Generalised advantage estimation (Schulman et al. 2016; Part I eq. 9). lam: a number, or [batch, 1].

    δ_t = R_t + γ V_next - V_t, A_t = δ_t + γ λ A_next, returns = A + V; next: the next *response* token, after the last
    one V = A = 0. Computed in float64 in log2(longest response) passes: after pass k, A_t sums the next 2^k tokens.
    """
    order, inside = _response_first(response_mask)
    rewards, values = (torch.where(inside, x.double().gather(1, order), 0.0) for x in (rewards, values))
    deltas = rewards - values
    deltas[:, :-1] += gamma * values[:, 1:]
    advantages = _discounted_sums(deltas, gamma * lam)
    return _in_place(advantages, response_mask), _in_place(advantages + values, response_mask)


def decoupled_gae(
    rewards: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor, gamma: float, lam: float,
    critic_lam: float = 1.0, **_,
) -> Estimate:  # fmt: skip
    """GAE with `lam` for the advantages and `critic_lam` for the returns (VC-PPO, arXiv 2503.01491, §3.3)."""
    advantages, _ = gae(rewards, values, response_mask, gamma, lam)
    return advantages, gae(rewards, values, response_mask, gamma, critic_lam)[1]


def length_adaptive_gae(
    rewards: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor, gamma: float, critic_lam: float = 1.0,
    length_alpha: float = 0.05, **_,
) -> Estimate:  # fmt: skip
    """`decoupled_gae` with λ = 1 - 1 / (length_alpha · l) for a response of l tokens, at least 0 (VAPO, 2504.05118)."""
    lengths = response_mask.sum(1, keepdim=True).double().clamp(min=1)
    lam = (1 - 1 / (length_alpha * lengths)).clamp(min=0)
    return decoupled_gae(rewards, values, response_mask, gamma, lam, critic_lam)


def rloo(rewards: torch.Tensor, response_mask: torch.Tensor, groups: torch.Tensor, **_) -> Estimate:
    """A_i = R_i - mean of the group's other R (Ahmadian et al. 2024, arXiv 2402.14740, §2.3); 0 in a group of one."""
    totals = _totals(rewards, response_mask)
    sizes, means = sum_by_group(torch.ones_like(totals), groups), _group_mean(totals, groups)
    return _on_tokens((totals - means) * sizes / (sizes - 1).clamp(min=1), response_mask), None


def grpo(rewards: torch.Tensor, response_mask: torch.Tensor, groups: torch.Tensor, **_) -> Estimate:
    """A_i = (R_i - group mean) / (group's sample deviation + 1e-6) (Shao et al. 2024, arXiv 2402.03300, §4.1.2)."""
    centred = _totals(rewards, response_mask)
    centred = centred - _group_mean(centred, groups)
    squares, sizes = (sum_by_group(x, groups) for x in (centred.square(), torch.ones_like(centred)))
    deviations = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return _on_tokens(centred / (deviations + 1e-6), response_mask), None


def grpo_no_std(rewards: torch.Tensor, response_mask: torch.Tensor, groups: torch.Tensor, **_) -> Estimate:
    """A_i = R_i - group mean (Dr. GRPO: Liu et al. 2025, arXiv 2503.20783, §3.2)."""
    totals = _totals(rewards, response_mask)
    return _on_tokens(totals - _group_mean(totals, groups), response_mask), None


def opo(rewards: torch.Tensor, response_mask: torch.Tensor, groups: torch.Tensor, **_) -> Estimate:
    """A_i = R_i - Σ l_j R_j / Σ l_j over the group, l: tokens of a response (Hao et al. 2025, arXiv 2505.23585).

    This baseline has the least variance if the squared norm of a response's score function grows with its length.
    """
    totals, lengths = _totals(rewards, response_mask), response_mask.sum(1).double()
    weights = sum_by_group(lengths, groups).clamp(min=1)
    return _on_tokens(totals - sum_by_group(lengths * totals, groups) / weights, response_mask), None


def reinforce_pp(rewards: torch.Tensor, response_mask: torch.Tensor, gamma: float, **_) -> Estimate:
    """A_t = R_t + γ A_next, without a baseline (REINFORCE++: Hu et al. 2025, arXiv 2501.03262).

    Its normalisation over the whole buffer is --use_advantage_norm.
    """
    return _in_place(_to_go(rewards, response_mask, gamma), response_mask), None


def reinforce_pp_baseline(rewards: torch.Tensor, response_mask: torch.Tensor, groups: torch.Tensor, **_) -> Estimate:
    """A_i = R_i - group mean, then normalised over the whole buffer as `reinforce_pp` (arXiv 2501.03262)."""
    return grpo_no_std(rewards, response_mask, groups)


def remax(
    rewards: torch.Tensor, response_mask: torch.Tensor, gamma: float, baselines: torch.Tensor | None = None, **_
) -> Estimate:
    """A_t = R_t + γ R_next + … - score of the prompt's greedy response (ReMax: Li et al. 2024, arXiv 2310.10505)."""
    to_go = _to_go(rewards, response_mask, gamma)
    return _in_place(to_go if baselines is None else to_go - baselines[:, None].double(), response_mask), None


ADVANTAGE_ESTIMATORS: dict[str, Callable[..., Estimate]] = {
    "gae": gae,
    "decoupled_gae": decoupled_gae,
    "length_adaptive_gae": length_adaptive_gae,
    "rloo": rloo,
    "grpo": grpo,
    "grpo_no_std": grpo_no_std,
    "opo": opo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "remax": remax,
}


def _response_first(response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (places of each row's response tokens, in order, then others; which of them are of the response)."""
    width = max(1, int(response_mask.sum(1).max()))
    order = (~response_mask).byte().argsort(dim=1, stable=True)[:, :width]
    return order, response_mask.gather(1, order)


def _in_place(x: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Puts values of response tokens, in the order of `_response_first`, back to the tokens' places."""
    place = (response_mask.cumsum(1) - 1).clamp(min=0)
    return torch.where(response_mask, x.gather(1, place).float(), 0.0)


def _discounted_sums(x: torch.Tensor, decay: float | torch.Tensor) -> torch.Tensor:
    """Returns y_t = x_t + decay · y_{t+1} in log2(width) passes. x [batch, width]; decay: a number, or [batch, 1]."""
    x, reach = x.clone(), 1
    while reach < x.shape[1]:
        x[:, :-reach] += decay * x[:, reach:]
        reach, decay = 2 * reach, decay**2
    return x


def _to_go(rewards: torch.Tensor, response_mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """Returns the discounted rewards from each response token on, in the order of `_response_first`. float64."""
    order, inside = _response_first(response_mask)
    return _discounted_sums(torch.where(inside, rewards.double().gather(1, order), 0.0), gamma)


def _totals(rewards: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Returns R_i. [batch] float64."""
    return torch.where(response_mask, rewards, 0.0).double().sum(1)


def _group_mean(x: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    return sum_by_group(x, groups) / sum_by_group(torch.ones_like(x), groups)


def _on_tokens(x: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Returns x_i on each token of response i. [batch] -> [batch, length] float32."""
    return torch.where(response_mask, x.float()[:, None], 0.0)
