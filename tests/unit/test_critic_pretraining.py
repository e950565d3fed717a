"""While only the critic trains: its learning rate, its loss, and the scale that its values start from."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ppo.experience import value_scale, with_values
from ppo.run import Run
from ppo.types import Experience
from ppo.update import critic_backward
from tests.helpers.parts import GradientEngine, ppo_config, rollout_by_hand, scored, tiny_models, tiny_scalar_model
from utils.engine.engine import TrainEngine, init_distributed


@pytest.mark.parametrize(
    ("flags", "first", "expected"),
    [
        # The critic trains alone at its full rate, and keeps it while the policy warms up.
        ({"critic_pretrain_steps": 8, "warmup_steps": 4}, 0, [(0.0, 1.0)] * 8 + [(0.25, 1.0), (0.5, 1.0)]),
        # Its own warm-up is a tenth of these steps.
        ({"critic_pretrain_steps": 40, "warmup_steps": 2}, 0, [(0.0, x) for x in (0.25, 0.5, 0.75, 1.0, 1.0)]),
        ({"critic_pretrain_steps": 0, "warmup_steps": 4}, 0, [(x, x) for x in (0.25, 0.5, 0.75, 1.0)]),
        ({"critic_pretrain_steps": 8, "warmup_steps": 4}, 58, [((4 / 51) ** 0.5,) * 2]),  # inverse_sqrt, both alike
    ],
)
def test_learning_rates_of_policy_and_critic(flags, first, expected):
    run = SimpleNamespace(config=ppo_config(lr=1.0, critic_lr=1.0, train_steps=100, **flags))
    found = [tuple(Run.learning_rates(run, first + i).values()) for i in range(len(expected))]
    assert found == [pytest.approx(pair) for pair in expected]


def test_no_clip_holds_the_values_then():
    """Old values far from the returns: clipping around them stops every gradient, unless only the critic trains."""
    experience, config = scored(rollout_by_hand(), tiny_models(), value_clip=1e-4)
    far = replace(experience, old_values=experience.old_values - 100.0)
    engine = GradientEngine(tiny_scalar_model(seed=2))
    _, clipped = critic_backward(engine, far, config)
    assert float(engine.gradients().norm()) == 0.0
    cut, tokens = clipped["value_clip_fraction"]
    assert cut == tokens
    _, alone = critic_backward(engine, far, config, clipped=False)
    assert float(engine.gradients().norm()) > 0.0
    squares = 0.5 * (experience.old_values - far.returns).square()[far.response_mask].sum()  # the same critic's values
    assert alone["value_loss"][0] == pytest.approx(float(squares), rel=1e-5)
    assert "value_clip_fraction" not in alone


def experience_of(values: list[list[float]], rewards: list[list[float]]) -> Experience:
    """Of two responses of two tokens each behind a prompt of one."""
    mask = torch.tensor([[False, True, True], [False, True, True]])
    values, rewards = (torch.tensor([[0.0, *row] for row in rows]) for rows in (values, rewards))
    zeros = torch.zeros_like(values)
    return Experience(zeros.long(), mask | True, mask, zeros, zeros, values, rewards, zeros, zeros)


def test_scale_and_shift_by_hand():
    # Sums of rewards to come: 3, 3 and -1, -1: mean 1, deviation 2. Values 10, 18 and 10, 18: mean 14, deviation 4.
    experience = experience_of([[10.0, 18.0], [10.0, 18.0]], [[0.0, 3.0], [0.0, -1.0]])
    config = ppo_config(critic_init_scale=0.5)
    assert value_scale(experience, config) == (pytest.approx(0.25), pytest.approx(1.0 - 0.25 * 14.0))
    values = 0.25 * experience.old_values - 2.5
    changed = with_values(experience, values.masked_fill(~experience.response_mask, 0.0), config)
    assert changed.old_values[experience.response_mask].tolist() == [0.0, 2.0, 0.0, 2.0]
    # λ 0.95: the last token's return is its reward, the first one's A + V = (2 - 0) + 0.95 (3 - 2) = 2.95.
    torch.testing.assert_close(changed.returns[0, 1:], torch.tensor([2.95, 3.0]))


@pytest.mark.parametrize(
    ("values", "rewards"), [([[5.0] * 2] * 2, [[0.0, 3.0]] * 2), ([[1.0, 2.0]] * 2, [[0.0, 3.0]] * 2)]
)
def test_without_a_deviation_values_are_only_shifted(values, rewards):
    experience = experience_of(values, rewards)
    scale, shift = value_scale(experience, ppo_config())
    assert scale == 1.0 and shift == pytest.approx(3.0 - float(torch.tensor(values).mean()))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_scaled_weight_is_what_forward_and_optimizer_see(stage):
    init_distributed()
    engine = TrainEngine(tiny_scalar_model(), ppo_config(zero_stage=stage), "critic")
    ids = torch.tensor([[1, 5, 6, 7]])
    mask = torch.ones_like(ids).bool()
    before = engine(ids, mask).detach().clone()
    engine.scale_weight("head.weight", 0.25)
    torch.testing.assert_close(engine(ids, mask).detach(), 0.25 * before)
    engine.backward(engine(ids, mask).square().sum())
    engine.measure()
    engine.apply(1e-12)  # the weights are written anew from the optimizer's float32 ones
    torch.testing.assert_close(engine(ids, mask).detach(), 0.25 * before, rtol=1e-4, atol=1e-6)
