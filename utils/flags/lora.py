"""Flags of LoRA: low-rank adapters that are trained instead of all weights. No torch."""

from dataclasses import dataclass, field
from typing import Literal

from utils.flags.fields import Common


@dataclass
class LoraFlags:
    """LoRA: train low-rank adapters instead of all weights (needs peft: pip install peft==0.21.2)."""

    lora_rank: Common[int] = 0
    """Rank of the adapters; 0: train all weights. The weights of the model are then frozen, and adapters, their
    gradients and optimizer state are float32"""
    lora_alpha: float | None = None
    """The adapters' output is multiplied by lora_alpha / lora_rank. Default: twice the rank"""
    lora_dropout: float = 0.0
    """Dropout probability of the adapters' input during training"""
    lora_target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the layers with adapters, such as q_proj v_proj. all-linear: all linear layers but the head"""
    use_dora: bool = False
    """Also train the norm of each column of the weights (DoRA, Liu et al. 2024)"""
    use_rslora: bool = False
    """Divide by the square root of the rank instead of the rank (rank-stabilised LoRA, Kalajdzievski 2023)"""

    export: Literal["merged", "adapter", "both"] = "merged"
    """What best/ and final/ hold. merged: a whole model; adapter: a folder of peft's, which names the frozen model;
    both: a whole model, and the adapter in best_adapter/ and final_adapter/"""

    @property
    def adapter_scale(self) -> float:
        """The value of --lora_alpha."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
