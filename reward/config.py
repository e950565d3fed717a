"""Flags of `python -m reward.train`."""

from dataclasses import dataclass, field
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.fields import Common
from utils.flags.supervised import FitConfig

RELEASED_METRICS = {"rm_loss": "loss", "rm_acc": "accuracy"}  # names in MOSS-RLHF's scripts


@dataclass
class RewardLossFlags:
    """Losses: of pairs, with what Part II adds to it."""

    reward_lm_loss_factor: Common[float] = 0.0
    """Weight (beta) of the language-model loss on the chosen answer. Part I, eq. 2: 1"""
    use_margin: Common[bool] = False
    """Subtract each pair's margin, if it has one, from its score difference (Part II: adaptive margin)"""
    margin_column: str | None = None
    """Name of the margin in the records. Default: `mean preference difference` (or with underscores), else `margin`"""
    label_smoothing: Common[float] = 0.0
    """Probability that a label is wrong, at least 0 and below 0.5 (Part II: label smoothing)"""
    flip_negative: Common[bool] = False
    """Swap chosen and rejected in training pairs with a negative `mean preference difference` (Part II, §2)"""
    simcse_coef: float = 0.0
    """Weight of the contrastive loss on pair differences (SimCSE). Doubles rows and forward passes. Part II: 1"""
    simcse_dropout: float = 0.1
    """Dropout probability that makes the two views of a pair for --simcse_coef; nothing else uses dropout"""
    simcse_temperature: float = 0.05
    """Temperature that cosine similarities are divided by for --simcse_coef"""


@dataclass
class RewardSaveFlags:
    """Saved model: how it is chosen and centered."""

    center_scores: Common[bool] = False
    """Shift scores so that held-out chosen answers have mean 0; the shift is saved as score_center in config.json"""
    center_data_path: list[str] = field(default_factory=list)
    """Dialogues whose answers get mean score 0 under --center_scores, in place of the held-out chosen answers"""
    validation_metric: Common[Literal[
        "accuracy", "worst_subset_accuracy", "loss", "score_difference", "calibration_error", "length_bias", "rm_loss",
        "rm_acc",
    ]] = "accuracy"  # fmt: skip
    """Metric on held-out pairs that chooses best/: the largest accuracy, worst_subset_accuracy or score_difference, or
    the smallest of the others. rm_loss and rm_acc are older names of loss and accuracy"""
    delimiter: str | None = None
    """End of every utterance; must be the tokenizer's EOS token. Default: that token"""


@dataclass
class RewardConfig(RewardLossFlags, RewardSaveFlags, FitConfig):
    """Train a reward model on preferences."""

    trains = "reward"

    data_path: Common[list[str]] = field(default_factory=list)
    """Preferences: folders of *train* and *valid* files, files or hub ids (owner/name:config@split). A number after
    each sets its share: a 0.7 b 0.3"""
    model_save_path: Common[str] = "outputs/reward"
    """Folder of the run: config.json, metrics.jsonl, best/, final/"""
    lr: Common[float] = 5e-6
    """Peak learning rate. Part I: 5e-6"""
    batch_size: Common[int] = 32
    """Pairs or ranked prompts per optimizer step at the mean length, over all GPUs; a step takes 4 to 128"""

    @property
    def larger_is_better(self) -> bool:
        """Whether a larger --validation_metric is better."""
        from reward.metrics import LARGER_IS_BETTER

        return LARGER_IS_BETTER[self.validation_metric]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validation_metric = RELEASED_METRICS.get(self.validation_metric, self.validation_metric)
        check_range(self, reward_lm_loss_factor=(0, None), simcse_coef=(0, None))
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing {self.label_smoothing:g}: pass a share from 0 to less than 0.5")
        if not 0 < self.simcse_dropout < 1:
            raise UserError(f"--simcse_dropout {self.simcse_dropout:g}: pass a share between 0 and 1")
        if not 0 < self.simcse_temperature < float("inf"):
            raise UserError(f"--simcse_temperature {self.simcse_temperature:g}: pass a positive number")
        for name, switch in (("margin_column", "use_margin"), ("center_data_path", "center_scores")):
            if getattr(self, name) and not getattr(self, switch):
                raise UserError(f"--{name} does nothing without --{switch}: pass both or neither")
        from reward.batches import MAX_PAIRS, MIN_PAIRS  # last, as this imports torch

        if not MIN_PAIRS <= self.batch_size <= MAX_PAIRS:
            raise UserError(f"--batch_size {self.batch_size}: pass {MIN_PAIRS} to {MAX_PAIRS} pairs, over all ranks")
