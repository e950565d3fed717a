"""Flags of `python -m sft.train`. No torch: a wrong flag is reported at once."""

import math
from dataclasses import dataclass, field

from data.order import BLOCK
from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.router import RouterFlags
from utils.flags.supervised import FitConfig
from utils.flags.text import StopFlags


@dataclass
class SFTConfig(StopFlags, RouterFlags, FitConfig):
    """Fine-tune a language model on dialogues."""

    data_path: list[str] = field(default_factory=list)
    """One or more: folders of *train.json(l) and *valid.json(l), files, hub ids"""
    data_weights: list[float] = field(default_factory=list)
    """A share of the samples for each --data_path, whatever their sizes; default: every dialogue once an epoch"""
    model_save_path: str = "outputs/sft"
    """Folder of the run: config.json, metrics.jsonl, samples.jsonl, best/, final/"""
    lr: float = 9.5e-6
    """Peak learning rate"""
    batch_size: int = 32
    """Dialogues an optimizer step, over all ranks"""
    packing: bool = True
    """Put several dialogues into one row of a forward pass, each seeing itself alone: speed and memory only.
    Switched off for models in which they would see each other, and for those that run without padding anyway: models
    of LLaMA's kind in bf16 on a GPU"""
    num_valid: int = 100
    """Dialogues taken off each --data_path for evaluation when it comes without a *valid* file; 0: none"""
    num_samples: int = 4
    """Held-out prompts that are answered, greedily, at each evaluation, for samples.jsonl and TensorBoard; 0: none"""
    maxlen_res: int = 128
    """Tokens of such an answer at most"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, num_samples=(0, None), maxlen_res=(1, None))
        if not all(self.data_path):
            raise UserError("--data_path holds an empty name: give folders, files or hub ids")
        if not self.data_weights:
            return
        if len(self.data_weights) != len(self.data_path):
            raise UserError(
                f"--data_weights gives {len(self.data_weights)} weights for {len(self.data_path)} of --data_path: "
                "give one each"
            )
        for weight in self.data_weights:
            if not BLOCK * weight >= sum(self.data_weights) > 0 or not math.isfinite(weight):
                raise UserError(
                    f"--data_weights {weight:g}: give positive numbers, none below a thousandth of their sum"
                )
