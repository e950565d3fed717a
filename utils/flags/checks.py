"""Checks of flag values that several commands share, and defaults that give way to the run at hand."""

import dataclasses
import math
import os

from utils.errors import UserError
from utils.flags.fields import default_of

SIZES = ("num_rollouts", "batch_size")  # flags whose defaults depend on data and ranks
SEEDS = (0, 10**9)  # with ranks and streams added, every generator takes these


def check_range(config, **limits: tuple[float | None, float | None]) -> None:
    """Raises UserError for the first named field outside its closed [low, high] range, or not finite."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise UserError(f"--{name} {value:g}: pass a number {bounds}")


def check_required(config) -> None:
    """Raises UserError that names all required flags without a value."""
    missing = [f"--{name}" for name in config.required if not getattr(config, name)]
    if missing:
        listed = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        raise UserError(
            f"{listed} {'are' if missing[1:] else 'is'} missing; pass a value{' for each' * bool(missing[1:])}"
            + f" ({config.hint})" * (not config.given)
        )


def fit_warmup(config) -> None:
    """Shortens a default warm-up that is longer than the run to a tenth of it. Raises UserError for an explicit one."""
    if config.warmup_steps > config.train_steps:
        replace_default(config, "warmup_steps", config.train_steps // 10, f"--train_steps is {config.train_steps}")
    if config.warmup_steps > config.train_steps:
        raise UserError(f"--warmup_steps {config.warmup_steps} exceeds --train_steps {config.train_steps}: lower it")


def choose(config, name: str, value, reason: str) -> None:
    """Sets a flag whose value is auto or a default that does not suit this run; the first rank says so.

    `config.replaced_defaults` keeps the old value, for config.json and for resuming.
    """
    old = getattr(config, name)
    config.replaced_defaults = {name: old} | config.replaced_defaults
    setattr(config, name, value)
    if os.environ.get("RANK", "0") == "0":
        print(f"--{name} {old}: {value} is used, as {reason}", flush=True)


def replace_default(config, name: str, value, reason: str) -> None:
    """`choose`, unless the user gave the flag or it has this value already."""
    if is_default(config, name) and getattr(config, name) != value:
        choose(config, name, value, reason)


def is_default(config, name: str) -> bool:
    """Whether the user did not set the flag: it has its default, or a value that replaced it."""
    default = next(default_of(field) for field in dataclasses.fields(config) if field.name == name)
    return name not in config.given and (name in config.replaced_defaults or getattr(config, name) == default)


def keep_sizes(config, saved: dict) -> None:
    """Sets SIZES that have their defaults to those of a saved run, as if the user had passed them."""
    for name in SIZES:
        if name in saved and hasattr(config, name) and is_default(config, name):
            replace_default(config, name, saved[name], "the checkpoint was made with it")
            config.given |= {name}
