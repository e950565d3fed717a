"""How often the critic trains: passes of its own, several steps on each minibatch."""

import pytest
import torch

from ppo.epochs import optimizer_steps
from ppo.update import update
from tests.helpers.parts import rollout_by_hand, scored, tiny_models

BOTH, POLICY, CRITIC = ("policy", "critic"), ("policy",), ("critic",)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((2, 0, 1), [[BOTH], [BOTH]]),
        ((1, 3, 1), [[BOTH], [CRITIC], [CRITIC]]),
        ((3, 1, 1), [[BOTH], [POLICY], [POLICY]]),
        ((2, 0, 3), [[BOTH, CRITIC, CRITIC]] * 2),
        ((2, 1, 2), [[BOTH, CRITIC], [POLICY]]),
        ((1, 2, 2, False), [[CRITIC, CRITIC]] * 2),  # the critic trains alone
        ((2, 5, 3, True, False), [[POLICY], [POLICY]]),  # an estimator without critic
        ((2, 5, 3, False, False), []),
    ],
)
def test_steps_by_hand(numbers, expected):
    assert optimizer_steps(*numbers) == expected


def steps_of(monkeypatch, lr: float = 1e-3, with_critic: bool = True, **flags) -> tuple[list[str], dict[str, float]]:
    """The optimizer steps of an update of four samples in two minibatches, one letter each, and its metrics."""
    models, made = tiny_models(), []
    experience, config = scored(rollout_by_hand(), models, batch_size=2, **flags)
    monkeypatch.setattr(models.policy, "apply", lambda lr: (made.append("p"), models.policy.drop_gradients()))
    monkeypatch.setattr(models.critic, "apply", lambda lr: (made.append("c"), models.critic.drop_gradients()))
    metrics = update(models.policy, models.critic if with_critic else None, experience, config, 0, lr, 1e-3)
    return made, metrics


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "pc" * 2),
        ({"critic_epochs": 2}, "pc" * 2 + "cc"),
        ({"ppo_epochs": 2, "critic_epochs": 1}, "pc" * 2 + "pp"),
        ({"critic_updates_per_policy_update": 3}, "pccc" * 2),
        ({"critic_epochs": 2, "critic_updates_per_policy_update": 2, "lr": 0.0}, "c" * 8),
        ({"critic_epochs": 2, "critic_updates_per_policy_update": 2, "with_critic": False}, "pp"),
    ],
)
def test_the_update_makes_these_steps(monkeypatch, flags, expected):
    made, metrics = steps_of(monkeypatch, **flags)
    assert "".join(made) == expected
    assert ("value_loss" in metrics) is ("c" in made) and ("policy_loss" in metrics) is ("p" in made)


def test_metrics_are_means_over_all_steps(monkeypatch):
    """No weight changes here, so that more steps on the same minibatches give the same means."""
    once, more = (steps_of(monkeypatch, critic_updates_per_policy_update=k)[1] for k in (1, 3))
    assert more == pytest.approx(once, rel=1e-5)


def test_a_bad_step_ends_the_steps_on_its_minibatch(monkeypatch):
    models, problems = tiny_models(), []
    flags = {"batch_size": 2, "critic_updates_per_policy_update": 3}
    experience, config = scored(rollout_by_hand(), models, **flags)
    monkeypatch.setattr(models.critic, "measure", lambda: float("inf"))
    start = torch.nn.utils.parameters_to_vector(models.policy.module.parameters()).clone()
    update(
        models.policy, models.critic, experience, config, 0, 1e-3, 1e-3,
        on_bad=lambda problem, batch: problems.append(problem),
    )  # fmt: skip
    assert len(problems) == 2 and all("critic" in problem for problem in problems)
    assert torch.equal(torch.nn.utils.parameters_to_vector(models.policy.module.parameters()), start)
