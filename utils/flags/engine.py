"""Flags of commands that run and train models: dtype, ZeRO stage, optimizer, memory. No torch."""

from dataclasses import dataclass
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range, choose
from utils.flags.fields import Common
from utils.flags.lora import LoraFlags, check_lora
from utils.flags.text import TextFlags


@dataclass
class ForwardConfig(TextFlags):
    """Memory and speed: how models are run."""

    dtype: Common[Literal["auto", "bf16", "fp32"]] = "auto"
    """Dtype of weights and activations. auto: bf16 if this machine multiplies it fast, else fp32. Scores,
    log-probabilities, losses and optimizer state are always float32"""
    attn_implementation: str | None = None
    """Attention kernel by its name in transformers: sdpa, flash_attention_2, eager. Default: transformers' choice"""


@dataclass
class OptimizerFlags:
    """Optimizer: AdamW and the limits on gradients."""

    gradient_clip: float = 1.0
    """Global gradient norm that each model's gradient is clipped to; 0: no clipping. Part of PPO-max, and by itself not
    enough to prevent collapse (Part I, Figures 17 and 18)"""
    explosion_limit: float = 1e9
    """Largest absolute loss, score or global gradient norm of a step; a larger one counts as not finite"""
    adam_beta1: float = 0.9
    """Decay rate of AdamW's first moment"""
    adam_beta2: float = 0.95
    """Decay rate of AdamW's second moment"""
    adam_eps: float = 1e-8
    """Number that AdamW adds to the square root of the second moment"""


@dataclass
class EngineConfig(OptimizerFlags, LoraFlags, ForwardConfig):
    """Memory and speed: how weights, gradients and optimizer state are stored."""

    zero_stage: Common[Literal[0, 1, 2, 3]] = 2
    """ZeRO stage. 0: each GPU holds everything. 1: optimizer state, and the frozen models of PPO, are split over GPUs;
    2: also gradients; 3: also weights of trained models"""
    offload_optimizer: bool = False
    """Keep optimizer state and float32 weights in host memory. Saves 12 bytes per parameter on the device; slower"""
    grad_accum_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype in which gradients of micro-batches are added up under --dtype bf16. fp32 takes 2 more bytes per parameter,
    split over GPUs, and needs --zero_stage 2 or 3"""
    gradient_checkpoint: Common[Literal["auto"] | bool] = False
    """Recompute activations in the backward pass: a third more time for a fraction of the memory. auto: on a GPU, in as
    few layers as the memory left after loading the models allows; on a CPU, in none"""
    compile: bool = False
    """Compile decoder layers with torch.compile for training and scoring; takes about a minute at the start. Decoding
    and frozen models that are split over GPUs are not compiled"""
    deterministic: bool = False
    """Use deterministic kernels, so that runs on GPUs repeat bit by bit; attention's backward pass is slower. An
    operation without such a kernel is reported; in a backward pass it stops the run"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self, gradient_clip=(0, None), explosion_limit=(1, None), adam_beta1=(0, 0.999999),
            adam_beta2=(0, 0.999999), adam_eps=(0, None),
        )  # fmt: skip
        check_lora(self)
        if self.zero_stage == 0 and self.dtype == "auto":
            choose(self, "dtype", "fp32", "--zero_stage 0 trains float32 weights only")
        if self.zero_stage == 0 and self.dtype == "bf16":
            raise UserError("--zero_stage 0 trains float32 weights only: pass --dtype fp32, or use --zero_stage 1")
        if self.zero_stage == 0 and self.offload_optimizer:
            raise UserError("--offload_optimizer needs --zero_stage 1, 2 or 3")
        if self.zero_stage < 2 and self.dtype != "fp32" and self.grad_accum_dtype == "fp32":
            raise UserError(f"--grad_accum_dtype fp32 does not work with --zero_stage {self.zero_stage}: use 2 or 3")
        if self.compile and self.zero_stage == 3:
            raise UserError("--compile does not work with --zero_stage 3, which gathers weights inside a layer")

    @property
    def adds_up_in_float32(self) -> bool:
        """Whether gradients of bf16 weights are kept in float32 between micro-batches."""
        return self.dtype == "bf16" and self.grad_accum_dtype == "fp32"


@dataclass
class RouterFlags(ForwardConfig):
    """Losses: what is added to the main loss."""

    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of a mixture-of-experts model's routers; 0: no such loss and no metrics of
    routers. Default: router_aux_loss_coef of the model's config.json"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_aux_loss_coef is not None:
            check_range(self, router_aux_loss_coef=(0, None))
