"""Checks of flag values that several commands share."""

import math

from utils.errors import UserError

SEEDS = (0, 10**9)  # with ranks and streams added, every generator takes these


def check_range(config, **limits: tuple[float | None, float | None]) -> None:
    """Raises UserError for the first named field outside its closed [low, high] range, or not finite."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise UserError(f"--{name} {value:g}: give a number {bounds}")


def check_warmup(config) -> None:
    """Raises UserError for a warm-up that is longer than the run: it would never reach its learning rate."""
    if config.warmup_steps > config.train_steps:
        raise UserError(f"--warmup_steps {config.warmup_steps}: give at most --train_steps {config.train_steps}")
