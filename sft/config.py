"""Flags of `python -m sft.train`. No torch: a wrong flag is reported at once."""

from dataclasses import dataclass

from utils.flags.checks import check_range
from utils.flags.engine import RouterFlags
from utils.flags.fields import Common
from utils.flags.supervised import FitConfig
from utils.flags.text import StopFlags


@dataclass
class SFTConfig(StopFlags, RouterFlags, FitConfig):
    """Fine-tune a language model on dialogues; only the assistant's turns are learned."""

    trains = "sft"

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
