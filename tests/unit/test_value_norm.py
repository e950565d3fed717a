"""--value_norm: the unit of the critic's head by hand, values that stay or move, and rewards of any scale."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ppo.advantages import gae
from ppo.critic_metrics import explained_variance
from ppo.experience import with_values
from ppo.fit_critic import normalise_values, restore_unit, scale_values
from ppo.models import Models
from ppo.run import Run
from ppo.state import RunState
from ppo.types import Experience
from ppo.update import critic_backward, update
from ppo.value_norm import Change, Unit, change_of_unit
from reward.model import load_scalar_model, save_scalar_model
from tests.helpers.parts import VOCAB_SIZE, GradientEngine, ppo_config, rollout_by_hand, scored, tiny_models
from tests.helpers.parts import tiny_scalar_model as scalar_model
from utils.engine.engine import TrainEngine, init_distributed
from utils.tensors import before, shift_to_next


def test_units_by_hand():
    """From mean 2, deviation 4 to mean 3, deviation 8. A head output h is V = 2 + 4 h before, 3 + 8 h after."""
    unit = Unit(4.0, -2.0)
    assert change_of_unit(unit, (2.0, 4.0), (3.0, 8.0), True) == Change(Unit(8.0, -2.0), 0.5)
    change = change_of_unit(unit, (2.0, 4.0), (3.0, 8.0), False)
    assert change.unit == Unit(8.0, -3.0) and change.weight_factor == 1.0
    for head in (-1.5, 0.0, 2.0):
        value = 2.0 + 4.0 * head
        assert change.slope * value + change.shift == 3.0 + 8.0 * head
        assert 8.0 * (0.5 * head) - (-2.0) == value  # PopArt's head is half as large


class ScalableEngine(GradientEngine):
    def scale_weight(self, name: str, factor: float) -> None:
        with torch.no_grad():
            self.module.get_parameter(name).mul_(factor)


def run_of(critic, config) -> SimpleNamespace:
    """What the functions of ppo/fit_critic.py read of a run."""
    logger = SimpleNamespace(say=lambda text: None)
    return SimpleNamespace(config=config, state=RunState(), models=Models(None, critic, None, None), logger=logger)


def values_of(critic, experience: Experience) -> torch.Tensor:
    with torch.no_grad():
        return shift_to_next(critic(experience.sequences, before(experience.response_mask)))


@pytest.mark.parametrize("kind", ["running", "popart"])
def test_old_values_are_those_of_the_critic_after_each_change(kind):
    experience, config = scored(rollout_by_hand(), tiny_models(), value_norm=kind, use_advantage_norm=False)
    critic = ScalableEngine(scalar_model(seed=2), "critic")
    run, torch_seed = run_of(critic, config), torch.Generator().manual_seed(3)
    experience = with_values(experience, values_of(critic, experience), config)
    for i, scale in enumerate((1.0, 50.0, 1000.0, 0.01)):
        rewards = scale * (2.0 + torch.randn(experience.rewards.shape, generator=torch_seed))
        shown = with_values(replace(experience, rewards=rewards), values_of(critic, experience), config)
        found = normalise_values(run, shown)
        after, mask = values_of(critic, experience), experience.response_mask
        torch.testing.assert_close(found.old_values, after, rtol=1e-5, atol=1e-4)
        assert critic.module.score_scale == run.state.value_moments.std
        if kind == "popart" or not i:  # the first unit changes no value
            torch.testing.assert_close(after, shown.old_values, rtol=1e-6, atol=1e-6)
            assert found is shown
        else:
            assert not torch.allclose(after[mask], shown.old_values[mask])
            expected = with_values(shown, after, config)
            torch.testing.assert_close(found.advantages, expected.advantages, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", ["running", "popart"])
@pytest.mark.parametrize("fitted", ["by the run", "before the run", "not at all"])
def test_values_are_kept_by_the_first_unit(kind, fitted):
    experience, config = scored(rollout_by_hand(), tiny_models(), value_norm=kind)
    critic = ScalableEngine(scalar_model(seed=2), "critic")
    run = run_of(critic, config)
    if fitted == "by the run":
        experience = scale_values(run, experience)
        assert run.state.critic_center is not None
    elif fitted == "before the run":
        critic.module.value_pretrained = True
        assert scale_values(run, experience) is experience and run.state.critic_center is None
    found = normalise_values(run, replace(experience, returns=1000.0 * experience.returns))
    torch.testing.assert_close(found.old_values, experience.old_values)
    torch.testing.assert_close(values_of(critic, experience), experience.old_values, rtol=1e-5, atol=1e-6)


def test_without_the_flag_nothing_changes():
    experience, config = scored(rollout_by_hand(), tiny_models())
    critic = ScalableEngine(scalar_model(seed=2), "critic")
    run = run_of(critic, config)
    assert normalise_values(run, experience) is experience
    assert run.state.value_moments is None and critic.module.score_scale == 1.0


def test_the_loss_and_its_clipping_are_in_the_heads_unit():
    """Returns, values and old values 1000 times as large, with that unit: the same loss, and the same gradient."""
    experience, config = scored(rollout_by_hand(), tiny_models(), value_clip=0.01)
    experience = replace(experience, returns=experience.returns + 3.0, old_values=experience.old_values + 0.005)
    small, large = (GradientEngine(scalar_model(seed=2), "critic") for _ in range(2))
    large.module.score_scale = 1000.0
    many = replace(experience, returns=1000 * experience.returns, old_values=1000 * experience.old_values)
    (loss, sums), (other, more) = critic_backward(small, experience, config), critic_backward(large, many, config)
    assert float(other) == pytest.approx(float(loss), rel=1e-4)
    assert more["value_clip_fraction"] == sums["value_clip_fraction"]
    torch.testing.assert_close(large.gradients(), small.gradients(), rtol=1e-3, atol=1e-5)


def test_a_restored_critic_has_the_unit_of_its_checkpoint():
    critic, state = GradientEngine(scalar_model(), "critic"), RunState(critic_center=-2.5)
    restore_unit(critic, state)
    assert (critic.module.score_scale, critic.module.score_center) == (1.0, -2.5)
    state.load_state_dict(state.state_dict() | {"value_moments": {"mean": 1.0, "count": 3, "squares": 18.0}})
    restore_unit(critic, state)
    assert (critic.module.score_scale, critic.module.score_center) == (3.0, -2.5)
    restore_unit(None, state)


def test_a_rollback_brings_the_unit_back():
    critic = GradientEngine(scalar_model(), "critic")
    run = run_of(critic, ppo_config(on_collapse="rollback", value_norm="popart"))
    saved = run.state.state_dict() | {"critic_center": 0.5, "value_moments": {"mean": 1.0, "count": 3, "squares": 18.0}}
    start = SimpleNamespace(state=saved)
    run.lifecycle = SimpleNamespace(newest_checkpoint=lambda say: start, restore=lambda start, seed: None)
    run.logger.rewind, run.averages, run.notified = lambda step: None, {}, set()
    critic.module.score_scale = 50.0  # of later steps
    assert Run._collapses(run, ["a sign"])
    assert (critic.module.score_scale, critic.module.score_center) == (3.0, 0.5)


def test_a_saved_model_has_the_scale_in_its_head(tmp_path):
    model = scalar_model()
    model.score_scale, model.score_center = 7.0, 0.5
    save_scalar_model(model, str(tmp_path / "saved"))
    again = load_scalar_model(str(tmp_path / "saved"), torch.float32, torch.device("cpu"))
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(again(ids, ids > 0), model(ids, ids > 0))


def explained_variance_after_training(scale: float, kind: str, steps: int = 80) -> float:
    """Trains a critic on rewards that follow odd tokens; returns its explained variance over the last 20 steps.

    At best 0.6, as later tokens are unknown.
    """
    init_distributed()
    config = ppo_config(
        value_norm=kind, use_critic_loss_clip=False, gradient_clip=1.0, explosion_limit=1e12, lam=1.0, batch_size=16,
        num_rollouts=16, critic_pretrain_steps=0,
    )  # fmt: skip
    critic = TrainEngine(scalar_model(seed=2), config, "critic")
    run, generator, pairs = run_of(critic, config), torch.Generator().manual_seed(5), []
    for step in range(steps):
        sequences = torch.randint(4, VOCAB_SIZE, (16, 6), generator=generator)
        mask = torch.ones_like(sequences).bool()
        response = mask.clone()
        response[:, :2] = False
        rewards = torch.zeros(16, 6)
        rewards[:, 2:] = scale * (sequences[:, 1:-1] % 2)  # known from the token before
        rewards[:, -1] += scale * 2.0
        zeros = torch.zeros_like(rewards)
        experience = Experience(sequences, mask, response, zeros, zeros, zeros, rewards, zeros, zeros)
        experience = with_values(experience, values_of(critic, experience), config)
        experience = normalise_values(run, scale_values(run, experience))
        pairs.append((gae(rewards, zeros, response, 1.0, 1.0)[1][response], experience.old_values[response]))
        update(None, critic, experience, config, step, 0.0, 1e-2)
    returns, values = map(torch.cat, zip(*pairs[-20:], strict=True))
    return float(explained_variance(returns, values))


def test_a_large_reward_is_learnt_under_value_norm_alone():
    small = explained_variance_after_training(1.0, "none")
    large = explained_variance_after_training(1000.0, "none")
    popart, running = (explained_variance_after_training(1000.0, kind) for kind in ("popart", "running"))
    assert small > 0.3 and popart > small - 0.1 and running > small - 0.1
    assert large < 0.1
