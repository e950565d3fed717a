"""User code of --reward_fn: loading it, calling it, checking what it returns."""

import copy
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Callable

from utils.errors import UserError

RewardFunction = Callable[[list[list[dict]], list[str]], list[float]]


def load_reward_fn(spec: str) -> RewardFunction:
    """Returns the function in `file.py:name`. Runs that file, which is the only user code that is ever executed."""
    path, _, name = spec.rpartition(":")
    if not path or not os.path.isfile(path):
        raise UserError(f"--reward_fn {spec}: give an existing file and a function, as in my_scores.py:length")
    module_spec = importlib.util.spec_from_file_location("reward_fn", path)
    if module_spec is None:
        raise UserError(f"--reward_fn {spec}: {path} is not a Python file; use a name that ends in .py")
    module = importlib.util.module_from_spec(module_spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ in the user's folder
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward_fn {spec} cannot be loaded: {_failure(error)}") from error
    finally:
        sys.dont_write_bytecode = writes
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward_fn {spec}: {path} has no function {name}; give the name of one")
    return getattr(module, name)


def call_reward_fn(
    reward_fn: RewardFunction, prompts: list[list[dict]], answers: list[str], finite: bool = False
) -> list[float]:
    """Returns one number per answer. Raises UserError for anything else, and with `finite` for NaN and infinity."""
    try:
        scores = reward_fn(copy.deepcopy(prompts), list(answers))
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward_fn failed: {_failure(error)}") from error
    try:
        scores = [float(score) for score in scores]
    except (TypeError, ValueError):
        raise UserError("--reward_fn must return a list of numbers, one per answer") from None
    if len(scores) != len(answers):
        raise UserError(f"--reward_fn returned {len(scores)} numbers for {len(answers)} answers; return one per answer")
    for i, score in enumerate(scores):
        if finite and not math.isfinite(score):
            raise UserError(f"--reward_fn returned {score:g} for answer {i}; return finite numbers")
    return scores


def _failure(error: Exception) -> str:
    """Returns where in the user's code an error was raised, on one line: "file.py:12: KeyError: 'x'; fix it"."""
    last = error if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"{last.filename}:{last.lineno}: {reason}; fix it"
