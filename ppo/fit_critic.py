"""The scale of the critic's values: fitted to the returns before training, and --value_norm."""

from ppo.experience import value_scale, with_values
from ppo.state import RunState
from ppo.types import Experience
from ppo.value_norm import Unit, change_of_unit
from utils.engine.engine import TrainEngine
from utils.moments import RunningMoments


def scale_values(run, experience: Experience) -> Experience:
    """Rescales the critic's values to the returns at the first step; returns new experience.

    Only with critic pre-training or --value_norm, unless --critic_init_scale is 0.

    A critic's first values are raw scores, larger than returns of normalised scores, and a few optimizer steps do not
    change that. Scales the head's weight and shifts `score_center` (`value_scale`), unless the critic was pre-trained
    on values (ppo/critic.py). Collective.
    """
    config, state, critic = run.config, run.state, run.models.critic
    wanted = state.step == 0 and (config.critic_pretrain_steps or config.value_norm != "none")
    wanted = wanted and config.critic_init_scale
    if not wanted or state.critic_center is not None or is_pretrained(critic):
        return experience
    scale, shift = value_scale(experience, config)
    critic.scale_weight("head.weight", scale)
    state.critic_center = critic.module.score_center = scale * critic.module.score_center - shift
    run.logger.say(f"critic: values scaled by {scale:.3g} and shifted by {shift:.3g} (--critic_init_scale)")
    return _with_moved_values(experience, scale, shift, config)


def normalise_values(run, experience: Experience) -> Experience:
    """Adds the buffer's returns to the statistics of --value_norm and sets the critic's unit; returns new experience.

    The first buffer sets the unit, which changes no value. Later, values change under `running` alone. Collective.
    """
    config, state, critic = run.config, run.state, run.models.critic
    if config.value_norm == "none":
        return experience
    keep = config.value_norm == "popart" or state.value_moments is None
    state.value_moments = state.value_moments or RunningMoments()
    old = state.value_moments.mean, state.value_moments.std
    state.value_moments.update(experience.returns[experience.response_mask])
    new = state.value_moments.mean, state.value_moments.std
    change = change_of_unit(Unit(critic.module.score_scale, critic.module.score_center), old, new, keep)
    if change.weight_factor != 1.0:
        critic.scale_weight("head.weight", change.weight_factor)
    state.critic_center = change.unit.center
    restore_unit(critic, state)
    if keep:
        return experience
    return _with_moved_values(experience, change.slope, change.shift, config)


def restore_unit(critic: TrainEngine | None, state: RunState) -> None:
    """Gives the critic the unit of its values that a checkpoint recorded."""
    if critic is None:
        return
    if state.critic_center is not None:
        critic.module.score_center = state.critic_center
    critic.module.score_scale = state.value_moments.std if state.value_moments else 1.0


def is_pretrained(critic: TrainEngine) -> bool:
    """Whether the critic was written by `python -m ppo.critic --pretrain`, so that it predicts returns."""
    return critic.module.value_pretrained


def _with_moved_values(experience: Experience, slope: float, shift: float, config) -> Experience:
    values = (slope * experience.old_values + shift).masked_fill(~experience.response_mask, 0.0)
    return with_values(experience, values, config)
