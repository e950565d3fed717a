"""Flags of `python -m reward.evaluate` and `python -m reward.strength`. No torch."""

import os
from dataclasses import dataclass, field

from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.data import RecordFlags
from utils.flags.engine import ForwardConfig
from utils.flags.fields import Common


@dataclass
class EvaluationFlags(RecordFlags, ForwardConfig):
    """Models and data: reward models and preferences."""

    required = ("model", "data_path")

    model: Common[list[str]] = field(default_factory=list)
    """Reward model, or several: folders or hub ids"""
    data_path: Common[list[str]] = field(default_factory=list)
    """Preferences: folders of *train* and *valid* files, files or hub ids (owner/name:config@split)"""
    output: Common[str] = ""
    """Folder for the results"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of all models. Default: the one in each model's folder"""
    context_truncate: Common[int | None] = None
    """Longest dialogue, in tokens; longer ones lose their oldest turns. Default: each model's window"""
    micro_batch_tokens: Common[int] = 8192
    """Tokens per forward pass, padding included. Changes speed and memory only"""

    def __post_init__(self) -> None:
        super().__post_init__()
        twice = next((path for path in self.model if self.model.count(path) > 1), None)
        if twice:
            raise UserError(f"--model contains {twice} twice: pass each reward model once")
        check_range(self, micro_batch_tokens=(1, None))
        if self.context_truncate is not None:
            check_range(self, context_truncate=(1, None))


@dataclass
class EvaluateConfig(EvaluationFlags):
    """Evaluate reward models on preferences: accuracy, calibration, length bias, agreement."""

    output: Common[str] = ""
    """Folder for evaluation.json and plots. Default: the table is printed only"""
    subsets: Common[list[str]] = field(default_factory=list)
    """Subsets to evaluate: `subset` of a record, else its file's name without train or valid. Default: all"""


@dataclass
class StrengthConfig(EvaluationFlags):
    """Annotate preferences with the mean and deviation of score differences over an ensemble of reward models."""

    required = (*EvaluationFlags.required, "output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.model) < 2:
            raise UserError("--model: pass at least two reward models, trained with different seeds")
        if os.path.lexists(self.output) and (not os.path.isdir(self.output) or os.listdir(self.output)):
            raise UserError(f"--output {self.output} already exists: choose another folder")
