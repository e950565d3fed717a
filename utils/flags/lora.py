"""Flags of LoRA: low-rank adapters that are trained instead of all weights. No torch."""

from dataclasses import dataclass, field, fields
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.fields import Common, default_of
from utils.optional import check_peft


@dataclass
class LoraFlags:
    """LoRA: train low-rank adapters instead of all weights (needs peft: pip install peft==0.21.2)."""

    lora_rank: Common[int] = 0
    """Rank of the adapters; 0: train all weights. The weights of the model are then frozen, and adapters,
    accumulated gradients and optimizer state are float32"""
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


def check_lora(config) -> None:
    """Raises UserError for amounts out of range, flags without effect or that do not work together, missing peft."""
    check_range(config, lora_rank=(0, None), lora_dropout=(0, 0.999))
    if config.lora_alpha is not None:
        check_range(config, lora_alpha=(1e-3, None))
    if not config.lora_rank:
        names = {x.name for x in fields(LoraFlags)} | {"critic_lora_rank", "share_base"}
        given = [x.name for x in fields(config) if x.name in names and getattr(config, x.name) != default_of(x)]
        if given:
            why = "all weights are trained, there are no adapters"
            raise UserError(f"--{given[0]} {getattr(config, given[0])}: {why}; pass --lora_rank, or leave it out")
        return
    if "all-linear" in config.lora_target_modules and len(config.lora_target_modules) > 1:
        raise UserError("--lora_target_modules all-linear: are all of them; leave the other names out")
    if config.zero_stage == 3:
        raise UserError("--lora_rank does not work with --zero_stage 3, which would split the frozen weights; use 2")
    if config.compile:
        raise UserError("--compile does not work with --lora_rank: layers change between forwards; drop one of them")
    check_peft("--lora_rank")
