"""The estimator of --advantage_estimator: one of ADVANTAGE_ESTIMATORS, or a function of the user's. No torch."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from ppo.reward_call import failure_of
from ppo.user_function import load_function
from utils.errors import UserError

ARGUMENTS = ("rewards", "values", "response_mask", "groups", "gamma", "lam", "critic_lam", "length_alpha", "baselines")


@dataclass(frozen=True)
class Estimator:
    """An estimator and the names of its parameters; takes_all: it has **others. spec: of a function of the user's."""

    function: Callable
    names: frozenset[str]
    takes_all: bool
    spec: str = ""

    def __call__(self, **arguments):
        """Calls the function with those of ARGUMENTS that it takes. Raises UserError if one of the user's fails."""
        taken = {name: x for name, x in arguments.items() if self.takes_all or name in self.names}
        if not self.spec:
            return self.function(**taken)
        try:
            found = self.function(**taken)
        except Exception as error:
            raise UserError(f"--advantage_estimator {self.spec}: {failure_of(error)}") from error
        self._check(found, arguments["rewards"])
        return found

    def _check(self, found, rewards) -> None:
        parts = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
        with_critic = "values" in self.names
        shapes = [getattr(x, "shape", None) for x in parts]
        if shapes != [rewards.shape, rewards.shape if with_critic else None]:
            form = "(advantages, returns)" if with_critic else "(advantages, None)"
            shape = f"the shape {tuple(rewards.shape)} of rewards"
            raise UserError(f"--advantage_estimator {self.spec}: return {form}, tensors of {shape}")
        if not all(bool(x.isfinite().all()) for x in parts if x is not None):
            raise UserError(f"--advantage_estimator {self.spec}: it returned a number that is not finite")


@cache
def load_estimator(spec: str) -> Estimator:
    """Returns the estimator of this name, or of file.py:function. Raises UserError."""
    from ppo.advantages import ADVANTAGE_ESTIMATORS  # here, as it imports torch

    function = ADVANTAGE_ESTIMATORS.get(spec)
    if function is None and ":" not in spec:
        names = ", ".join(ADVANTAGE_ESTIMATORS)
        raise UserError(f"--advantage_estimator {spec}: use one of {names}, or file.py:function")
    function = function or load_function(spec, "--advantage_estimator", "my_estimator.py:advantages", {})
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if unknown := [p.name for p in named if p.name not in ARGUMENTS and p.default is p.empty]:
        raise UserError(
            f"--advantage_estimator {spec} has the parameter {unknown[0]}; name its parameters as some of "
            f"{', '.join(ARGUMENTS)}"
        )
    names = frozenset(p.name for p in named)
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    return Estimator(function, names, takes_all, spec if ":" in spec else "")


def needs_of(spec: str) -> frozenset[str]:
    """Returns the names of the estimator's parameters: `values` means that it has a critic."""
    return frozenset({"values"}) if spec == "gae" else load_estimator(spec).names
