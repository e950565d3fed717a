"""Flags about reward models that `train_ppo.py` and `ppo.compare` share. No torch."""

from dataclasses import dataclass, field
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.engine import ForwardConfig
from utils.flags.fields import Common
from utils.flags.text import StopFlags

TEMPLATES = ("moss_en", "moss_zh", "chat")


@dataclass
class FrozenFlags:
    """Memory and speed: models that are not trained."""

    offload_frozen: bool = False
    """Keep reference and reward models in host memory and copy them to the device one at a time for scoring. With
    several GPUs and --zero_stage 1 to 3, each process keeps a share and GPUs gather one layer at a time"""


@dataclass
class RewardFlags(FrozenFlags, StopFlags, ForwardConfig):
    """Models and data: the reward models, and how their scores are combined."""

    reward_model_path: Common[list[str]] = field(default_factory=list)
    """Reward model that scores the answers, or several: folders or hub ids"""
    reward_tokenizer_name_or_path: list[str] = field(default_factory=list)
    """Tokenizer of the reward model; one for all models or one each. If it is not the policy's, answers are decoded and
    encoded again. Default: the one in the reward model's folder, else the policy's"""
    reward_template: list[str] = field(default_factory=list)
    """Template of each reward model: moss_en, moss_zh, chat. Default: that of its tokenizer, else the policy's"""
    reward_ensemble: Literal["mean", "min", "mean_minus_std"] = "mean"
    """How scores of several models are combined: mean, min, or mean minus --ensemble_std_coef standard deviations"""
    ensemble_std_coef: float = 1.0
    """Weight of the standard deviation under --reward_ensemble mean_minus_std"""

    def __post_init__(self) -> None:
        super().__post_init__()
        paths = self.reward_paths
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice:
            raise UserError(f"--reward_model_path contains {twice} twice: pass each reward model once")
        for name in ("reward_tokenizer_name_or_path", "reward_template"):
            count = len(getattr(self, name))
            if count not in (0, len(paths)) and (count > 1 or not paths):
                raise UserError(f"--{name} has {count} values for {len(paths)} reward models: pass one, or one each")
        unknown = next((name for name in self.reward_template if name not in TEMPLATES), None)
        if unknown:
            raise UserError(f"--reward_template {unknown}: choose from {', '.join(TEMPLATES)}")
        check_range(self, ensemble_std_coef=(0, None))
        if self.reward_ensemble != "mean" and len(paths) < 2:
            raise UserError(f"--reward_ensemble {self.reward_ensemble} needs several models: --reward_model_path A B C")
        if self.reward_ensemble == "mean_minus_std" and not self.ensemble_std_coef:
            raise UserError("--reward_ensemble mean_minus_std with --ensemble_std_coef 0 is the mean: pass more than 0")

    @property
    def reward_paths(self) -> list[str]:
        """The reward models that score; none if --reward_fn alone does."""
        return self.reward_model_path

    @property
    def reward_flag(self) -> str:
        """The flag that named them."""
        return "--reward_model_path"

    def reward_sources(self) -> list[tuple[str, str | None, str | None]]:
        """(path, tokenizer, template) of each reward model; None where its flag is not given."""
        paths = self.reward_paths
        columns = [_each(values, len(paths)) for values in (self.reward_tokenizer_name_or_path, self.reward_template)]
        return list(zip(paths, *columns, strict=True))


def _each(values: list[str], count: int) -> list[str | None]:
    return values if len(values) == count else (values or [None]) * count
