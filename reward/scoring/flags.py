"""The flags about reward models that `train_ppo.py` and `ppo.compare` share. No torch."""

from dataclasses import dataclass, field
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.engine import ForwardConfig
from utils.flags.text import StopFlags

TEMPLATES = ("moss_en", "moss_zh", "chat")


@dataclass
class RewardFlags(StopFlags, ForwardConfig):
    """Which reward models score, how they read an answer, and how their scores become one."""

    reward_model_path: list[str] = field(default_factory=list)
    """Reward model that scores the answers, or several"""
    reward_tokenizer_name_or_path: list[str] = field(default_factory=list)
    """Tokenizer of the reward model (one for all, or one each); default: the one in its folder, else the policy's.
    Where it differs from the policy's, answers are decoded and encoded anew"""
    reward_template: list[str] = field(default_factory=list)
    """Template of the reward model (one for all, or one each): moss_en, moss_zh, chat; default: the one that its
    tokenizer was saved with, else the policy's"""
    reward_ensemble: Literal["mean", "min", "mean_minus_std"] = "mean"
    """How the raw scores of several reward models become one: their mean, the lowest, or the mean less
    --ensemble_std_coef times their deviation"""
    ensemble_std_coef: float = 1.0
    """k of mean - k x deviation"""
    offload_frozen: bool = False
    """Keep reference and reward models in host memory and copy one at a time to the device for scoring. With several
    ranks and --zero_stage 1 to 3, each rank keeps its share of them there, and devices gather one layer at a time"""

    def __post_init__(self) -> None:
        super().__post_init__()
        paths = self.reward_paths
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice:
            raise UserError(f"--reward_model_path names {twice} twice: give each reward model once")
        for name in ("reward_tokenizer_name_or_path", "reward_template"):
            count = len(getattr(self, name))
            if count not in (0, len(paths)) and (count > 1 or not paths):
                raise UserError(f"--{name} has {count} values for {len(paths)} reward models: give one, or one each")
        unknown = next((name for name in self.reward_template if name not in TEMPLATES), None)
        if unknown:
            raise UserError(f"--reward_template {unknown}: choose from {', '.join(TEMPLATES)}")
        check_range(self, ensemble_std_coef=(0, None))
        if self.reward_ensemble != "mean" and len(paths) < 2:
            raise UserError(f"--reward_ensemble {self.reward_ensemble} needs several models: --reward_model_path A B C")
        if self.reward_ensemble == "mean_minus_std" and not self.ensemble_std_coef:
            raise UserError("--reward_ensemble mean_minus_std with --ensemble_std_coef 0 is the mean: give an amount")

    @property
    def reward_paths(self) -> list[str]:
        """The reward models that score; none where --reward_fn alone does."""
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
