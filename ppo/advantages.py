"""Generalised advantage estimation."""

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns over the response tokens (Schulman et al. 2016; Part I eq. 9).

    δ_t = R_t + γ V_next - V_t, A_t = δ_t + γ λ A_next, where next is the next *response* token: what lies in a gap or
    in the padding is never read, and after the last token V and A are 0. All [batch, length]; returns = A + V.
    One pass from the end: time grows with length, a few vectors of [batch] are held.
    """
    advantages = torch.zeros_like(rewards, dtype=torch.float32)
    rewards, values = rewards.float(), values.float()
    next_value = torch.zeros(len(rewards), device=rewards.device)
    next_advantage = torch.zeros_like(next_value)
    for t in range(rewards.shape[1] - 1, -1, -1):
        inside = response_mask[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_advantage = torch.where(inside, advantage, next_advantage)
        next_value = torch.where(inside, values[:, t], next_value)
        advantages[:, t] = torch.where(inside, advantage, 0.0)
    returns = (advantages + values).masked_fill(~response_mask, 0.0)
    return advantages, returns
