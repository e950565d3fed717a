"""Flags of the user's reward functions. No torch."""

import math
from dataclasses import dataclass, field

from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.fields import Common


@dataclass
class RewardFunctionFlags:
    """Reward functions: Python code of your own that scores answers."""

    reward_fn: Common[list[str]] = field(default_factory=list)
    """Python function file.py:name that scores responses, or several: (prompts, answers, **columns of the prompts'
    records) -> a number per answer. THE FILES ARE RUN. Without --reward_model_path they replace the reward model; with
    it, all scores are added"""
    reward_fn_weights: list[float] = field(default_factory=list)
    """Factors of the scores of the functions of --reward_fn, in their order. Default: 1 for each"""
    reward_fn_timeout: float = 0.0
    """Seconds after which a call of a function of --reward_fn ends the run; 0: no limit but --hang_timeout. Each
    process calls it with its share of the responses"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, reward_fn_timeout=(0, None))
        given, wanted = len(self.reward_fn_weights), len(self.reward_fn)
        if given not in (0, wanted) or not all(map(math.isfinite, self.reward_fn_weights)):
            weights = " ".join(f"{weight:g}" for weight in self.reward_fn_weights)
            raise UserError(
                f"--reward_fn_weights {weights}: pass a finite number for each of the {wanted} functions of --reward_fn"
            )
        if 0 < self.hang_timeout <= self.reward_fn_timeout:
            raise UserError(
                f"--reward_fn_timeout {self.reward_fn_timeout:g} is never reached, since --hang_timeout "
                f"{self.hang_timeout:g} ends the run first; raise --hang_timeout above it"
            )
