"""Flags of `python -m reward.train`."""

from dataclasses import dataclass
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.supervised import FitConfig

RELEASED_METRICS = {"rm_loss": "loss", "rm_acc": "accuracy"}  # names in MOSS-RLHF's scripts


@dataclass
class RewardConfig(FitConfig):
    """Train a reward model on preferences."""

    model_save_path: str = "outputs/reward"
    """Folder of the run: config.json, metrics.jsonl, best/, final/"""
    lr: float = 5e-6
    """Peak learning rate"""
    batch_size: int = 32
    """Pairs or ranked prompts an optimizer step over all ranks, at the mean length: 4 to 128, by their token count"""
    reward_lm_loss_factor: float = 0.0
    """Weight of the language-model loss on the chosen answer (beta; 1 in Part I)"""
    use_margin: bool = False
    """Take each pair's margin off its score difference (Part II's adaptive margin); a pair without one has margin 0"""
    margin_column: str | None = None
    """Column of the margin; default: `mean preference difference`, else `margin`. Spaces may be underscores"""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong, 0 up to 0.5"""
    flip_negative: bool = False
    """Swap chosen and rejected in training pairs whose `mean preference difference` is negative (Part II §2)"""
    simcse_coef: float = 0.0
    """Weight of the contrastive loss on pair differences (SimCSE; 1 in Part II). Doubles rows and forwards of a step"""
    simcse_dropout: float = 0.1
    """With --simcse_coef: dropout that makes the two views of a pair; nothing else in training has any"""
    simcse_temperature: float = 0.05
    """With --simcse_coef: what cosines are divided by"""
    center_scores: bool = False
    """Shift scores so that held-out chosen answers have mean 0; kept as score_center in the saved config"""
    center_data_path: str | None = None
    """With --center_scores: dialogues whose answers are to have mean 0 instead, such as those of SFT"""
    validation_metric: Literal[
        "accuracy",
        "worst_subset_accuracy",
        "loss",
        "score_difference",
        "calibration_error",
        "length_bias",
        "rm_loss",
        "rm_acc",
    ] = "accuracy"
    """What picks best/, on held-out pairs: the largest of the accuracies and score_difference, the least of the rest.
    rm_loss and rm_acc are the released script's names for loss and accuracy"""
    delimiter: str | None = None
    """What ends every utterance. Only the tokenizer's own EOS, the default, is in use with our templates"""

    @property
    def larger_is_better(self) -> bool:
        """Whether --validation_metric is to be large."""
        from reward.metrics import LARGER_IS_BETTER

        return LARGER_IS_BETTER[self.validation_metric]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validation_metric = RELEASED_METRICS.get(self.validation_metric, self.validation_metric)
        check_range(self, reward_lm_loss_factor=(0, None), simcse_coef=(0, None))
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing {self.label_smoothing:g}: give a share from 0 to less than 0.5")
        if not 0 < self.simcse_dropout < 1:
            raise UserError(f"--simcse_dropout {self.simcse_dropout:g}: give a share between 0 and 1")
        if not 0 < self.simcse_temperature < float("inf"):
            raise UserError(f"--simcse_temperature {self.simcse_temperature:g}: give a positive number")
        for name, switch in (("margin_column", "use_margin"), ("center_data_path", "center_scores")):
            if getattr(self, name) and not getattr(self, switch):
                raise UserError(f"--{name} does nothing without --{switch}: add it, or leave --{name} out")
        from reward.batches import MAX_PAIRS, MIN_PAIRS  # last, as this imports torch

        if not MIN_PAIRS <= self.batch_size <= MAX_PAIRS:
            raise UserError(f"--batch_size {self.batch_size}: give {MIN_PAIRS} to {MAX_PAIRS} pairs, over all ranks")
