"""Flags of `python -m sft.train`. No torch: a wrong flag is reported at once."""

import math
from dataclasses import dataclass, field

from data.order import BLOCK
from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.engine import RouterFlags
from utils.flags.fields import Common
from utils.flags.supervised import FitConfig
from utils.flags.text import StopFlags


@dataclass
class SFTConfig(StopFlags, RouterFlags, FitConfig):
    """Fine-tune a language model on dialogues; only the assistant's turns are learned."""

    data_path: Common[list[str]] = field(default_factory=list)
    """Data: one or more folders of *train.json(l) and *valid.json(l) files, files or hub ids"""
    data_weights: list[float] = field(default_factory=list)
    """Share of the samples that each --data_path gets, whatever its size. Default: every dialogue once per epoch"""
    model_save_path: Common[str] = "outputs/sft"
    """Folder of the run: config.json, metrics.jsonl, samples.jsonl, best/, final/"""
    lr: Common[float] = 9.5e-6
    """Peak learning rate. Part I: 9.5e-6; Part II: 2e-5"""
    batch_size: Common[int] = 32
    """Dialogues per optimizer step, over all GPUs. Part I: 1024; Part II: 32"""
    packing: Common[bool] = True
    """Put several dialogues into one row of a forward pass; each attends to itself only. Changes speed and memory only.
    Switched off for models that cannot, and for those that run without padding anyway (LLaMA-like ones in bf16 on a
    GPU)"""
    num_samples: int = 4
    """Held-out prompts that are answered greedily at each evaluation, for samples.jsonl and TensorBoard; 0: none"""
    maxlen_res: int = 128
    """Longest of these answers, in tokens"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, num_samples=(0, None), maxlen_res=(1, None))
        if not all(self.data_path):
            raise UserError("--data_path contains an empty name: pass folders, files or hub ids")
        if not self.data_weights:
            return
        if (count := len(self.data_weights)) != len(self.data_path):
            raise UserError(
                f"--data_weights has {count} values for {len(self.data_path)} of --data_path: pass one each"
            )
        for weight in self.data_weights:
            if not BLOCK * weight >= sum(self.data_weights) > 0 or not math.isfinite(weight):
                raise UserError(f"--data_weights {weight:g}: pass positive numbers, none below 1/1000 of their sum")
