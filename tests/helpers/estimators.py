"""Batches for tests of the advantage estimators, and how the run calls an estimator."""

import math

import torch

from ppo.advantages import ADVANTAGE_ESTIMATORS

ALL = sorted(ADVANTAGE_ESTIMATORS)
OF_GROUPS = ("grpo", "grpo_no_std", "opo", "reinforce_pp_baseline", "rloo")
WITHOUT_CRITIC = (*OF_GROUPS, "reinforce_pp", "remax")
NAN = math.nan


def estimate(name: str, batch: dict, **changed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Calls the estimator as the run does: with every keyword; values None without a critic."""
    arguments = batch | changed
    if name in WITHOUT_CRITIC:
        arguments["values"] = None
    return ADVANTAGE_ESTIMATORS[name](**arguments)


def batch_of(rewards: list, mask: list | None = None, groups: list | None = None, **others) -> dict:
    """A batch with these rewards, and values of 0; all tokens of one group unless given."""
    rewards = torch.tensor(rewards)
    mask = torch.ones_like(rewards).bool() if mask is None else torch.tensor(mask).bool()
    groups = torch.zeros(len(rewards), dtype=torch.int64) if groups is None else torch.tensor(groups)
    values = torch.zeros_like(rewards)
    return {"rewards": rewards, "values": values, "response_mask": mask, "groups": groups} | {
        "gamma": 1.0, "lam": 0.95, "critic_lam": 1.0, "length_alpha": 0.05, "baselines": torch.zeros(len(rewards)),
    } | others  # fmt: skip


def random_batch(seed: int, gamma: float = 0.9) -> dict:
    """Rows with padding, gaps and NaN outside the response, one row empty; groups of 1 to 5 rows, in random order."""
    draw = torch.Generator().manual_seed(seed)
    groups = torch.tensor([7] * 5 + [0] * 1 + [-3] * 4 + [10**6] * 2)[torch.randperm(12, generator=draw)]
    lengths = torch.randint(3, 12, (12, 1), generator=draw)
    mask = (torch.arange(14) < lengths) & (torch.rand(12, 14, generator=draw) < 0.7)
    mask[seed % 12] = False
    rewards, values = (torch.randn(12, 14, generator=draw).where(mask, torch.tensor(NAN)) for _ in range(2))
    baselines = torch.randn(12, generator=draw)
    return {"rewards": rewards, "values": values, "response_mask": mask, "groups": groups} | {
        "gamma": gamma, "lam": 0.8, "critic_lam": 0.97, "length_alpha": 0.3, "baselines": baselines,
    }  # fmt: skip


def close(found: torch.Tensor, expected: torch.Tensor | list, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def same(first: tuple, second: tuple, tolerance: float = 1e-5) -> None:
    close(first[0], second[0], tolerance)
    assert (first[1] is None) == (second[1] is None)
    if first[1] is not None:
        close(first[1], second[1], tolerance)
