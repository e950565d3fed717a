"""The advantage estimators as loops over Python floats, from the papers' equations and without ppo.advantages.

A row is a list of (reward, value) of the response tokens, in order. Each function returns the rows' advantages, or
(advantages, returns), as lists of the same form.
"""

import math
from statistics import mean, stdev

import torch

Row = list[tuple[float, float]]


def rows_of(rewards: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor) -> list[Row]:
    """Returns the response tokens of each row."""
    width = range(rewards.shape[1])
    return [
        [(float(rewards[i, t]), float(values[i, t])) for t in width if response_mask[i, t]] for i in range(len(rewards))
    ]


def plain_gae(row: Row, gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """A_t is the sum over k of (γλ)^k δ_{t+k}, with every term written out; return = A + V."""
    values = [value for _, value in row] + [0.0]
    deltas = [row[t][0] + gamma * values[t + 1] - values[t] for t in range(len(row))]
    advantages = [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(row))) for t in range(len(row))]
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=False)]


def plain(
    name: str, rows: list[Row], groups: list[int], gamma: float, lam: float, critic_lam: float, length_alpha: float,
    baselines: list[float],
) -> tuple[list[list[float]], list[list[float]] | None]:  # fmt: skip
    """Returns (advantages, returns) of the estimator `name` for all rows; returns None without a critic."""
    if "gae" in name:
        return plain_with_critic(name, rows, gamma, lam, critic_lam, length_alpha)
    if name in ("reinforce_pp", "remax"):
        less = baselines if name == "remax" else [0.0] * len(rows)
        to_go = [plain_gae([(reward, 0.0) for reward, _ in row], gamma, 1.0)[0] for row in rows]
        return [[x - baseline for x in row] for row, baseline in zip(to_go, less, strict=True)], None
    scores = [sum(reward for reward, _ in row) for row in rows]
    advantages = []
    for i, row in enumerate(rows):
        members = [j for j in range(len(rows)) if groups[j] == groups[i]]
        advantages.append([of_group(name, i, members, scores, [len(row) for row in rows])] * len(row))
    return advantages, None


def plain_with_critic(
    name: str, rows: list[Row], gamma: float, lam: float, critic_lam: float, length_alpha: float
) -> tuple[list[list[float]], list[list[float]]]:
    advantages, returns = [], []
    for row in rows:
        policy_lam = lam
        if name == "length_adaptive_gae" and row:
            policy_lam = max(0.0, 1 - 1 / (length_alpha * len(row)))
        advantages.append(plain_gae(row, gamma, policy_lam)[0])
        returns.append(plain_gae(row, gamma, lam if name == "gae" else critic_lam)[1])
    return advantages, returns


def of_group(name: str, i: int, members: list[int], scores: list[float], lengths: list[int]) -> float:
    """Returns the advantage of response i in the group of `members`."""
    own = [scores[j] for j in members]
    if name == "rloo":
        others = [scores[j] for j in members if j != i]
        return scores[i] - mean(others) if others else 0.0
    if name == "grpo":
        return (scores[i] - mean(own)) / ((stdev(own) if len(own) > 1 else 0.0) + 1e-6)
    if name == "opo":
        tokens = sum(lengths[j] for j in members)
        return scores[i] - math.fsum(lengths[j] * scores[j] for j in members) / tokens if tokens else 0.0
    assert name in ("grpo_no_std", "reinforce_pp_baseline")
    return scores[i] - mean(own)
