"""Generalised advantage estimation."""

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (advantages, returns) of the response tokens (Schulman et al. 2016; Part I eq. 9). All [batch, length].

    δ_t = R_t + γ V_next - V_t, A_t = δ_t + γ λ A_next, returns = A + V; next: the next *response* token, after the last
    one V = A = 0. Computed in float64 in log2(longest response) passes: after pass k, A_t sums the next 2^k tokens.
    """
    width = max(1, int(response_mask.sum(1).max()))
    order = (~response_mask).byte().argsort(dim=1, stable=True)[:, :width]  # response tokens first, in order
    inside = response_mask.gather(1, order)
    rewards, values = (torch.where(inside, x.double().gather(1, order), 0.0) for x in (rewards, values))
    advantages = rewards - values
    advantages[:, :-1] += gamma * values[:, 1:]
    reach, decay = 1, gamma * lam
    while reach < width:
        advantages[:, :-reach] += decay * advantages[:, reach:]
        reach, decay = 2 * reach, decay**2
    place = (response_mask.cumsum(1) - 1).clamp(min=0)
    back = (x.gather(1, place).float() for x in (advantages, advantages + values))
    return tuple(torch.where(response_mask, x, 0.0) for x in back)
