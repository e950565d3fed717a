"""References that move (--reference ema, periodic), and the averaged policy of --policy_ema."""

from ppo.config import PPOConfig
from ppo.models import Models
from utils.engine.average import WeightAverage

Averages = dict[str, WeightAverage]  # "reference", "policy_ema": those that the flags ask for


def new_averages(config: PPOConfig, models: Models) -> Averages:
    """Returns the averages of the policy's weights that the flags ask for. Under periodic it is a copy of them."""
    wanted = {"reference": config.reference != "frozen", "policy_ema": bool(config.policy_ema)}
    return {name: WeightAverage(models.policy) for name, is_wanted in wanted.items() if is_wanted}


def update_averages(averages: Averages, models: Models, config: PPOConfig, steps: int) -> None:
    """Updates the averages, and moves the reference, after the `steps`-th step that trained the policy. Collective."""
    if "policy_ema" in averages:
        averages["policy_ema"].update(config.policy_ema)
    if config.reference == "ema" or (config.reference == "periodic" and steps % config.reference_interval == 0):
        averages["reference"].update(config.reference_decay if config.reference == "ema" else 0.0)
        move_reference(averages, models)


def move_reference(averages: Averages, models: Models) -> None:
    """Gives the reference the weights of its average, if it has one. Collective."""
    if "reference" in averages:
        averages["reference"].write_to(models.reference.model)
