"""Flags of the commands that run and train models: dtype, ZeRO stage, optimizer, memory."""

from dataclasses import dataclass
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.text import TextFlags


@dataclass
class ForwardConfig(TextFlags):
    """Flags of whatever runs a model."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of weights and activations; scores, log-probabilities, losses and optimizer state are float32 either way"""
    attn_implementation: str | None = None
    """Attention kernel by its transformers name (sdpa, flash_attention_2, eager); default: transformers' own choice"""


@dataclass
class EngineConfig(ForwardConfig):
    """Flags that every training stage shares: how weights are held, split and stepped."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 1 splits optimizer state, and the frozen models of PPO, over ranks; 2 also gradients; 3 also the
    weights of trained models"""
    offload_optimizer: bool = False
    """Keep optimizer state and float32 weights in host memory (slower, saves 12 bytes a parameter on the device)"""
    grad_accum_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype that the gradients of a step's micro-batches add up in under --dtype bf16 (fp32 models add up in float32
    either way). fp32 takes 2 more bytes a parameter, split over ranks, and --zero_stage 2 or 3"""
    gradient_clip: float = 1.0
    """Global gradient norm that each engine is clipped to; 0 switches clipping off"""
    explosion_limit: float = 1e9
    """A loss, score or global gradient norm beyond this is as bad as one that is not finite: no step is made"""
    adam_beta1: float = 0.9
    """AdamW: decay of the first moment"""
    adam_beta2: float = 0.95
    """AdamW: decay of the second moment"""
    adam_eps: float = 1e-8
    """AdamW: added to the root of the second moment"""
    gradient_checkpoint: Literal["auto"] | bool = False
    """Recompute activations in the backward pass: about a third more time for a fraction of the memory. auto: on a GPU
    recompute as few layers as the memory that is free once the models are loaded allows; on a CPU none"""
    compile: bool = False
    """Compile the decoder layers (torch.compile) for forward and backward passes: about a minute at the start. Not
    compiled are decoding, and frozen models that are split over ranks. On a CPU steps got no faster"""
    deterministic: bool = False
    """Use deterministic kernels, so that runs on GPUs repeat bit by bit; the backward pass of attention becomes slower.
    An operation that has no such kernel is named; in a backward pass it stops the run"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self,
            gradient_clip=(0, None),
            explosion_limit=(1, None),
            adam_beta1=(0, 0.999999),
            adam_beta2=(0, 0.999999),
            adam_eps=(0, None),
        )
        if self.dtype == "bf16" and self.zero_stage == 0:
            raise UserError(
                "--zero_stage 0 holds one float32 copy of the weights: give --dtype fp32 with it, or --zero_stage 1"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise UserError("--offload_optimizer needs --zero_stage 1, 2 or 3")
        if self.adds_up_in_float32 and self.zero_stage < 2:
            raise UserError(
                f"--grad_accum_dtype fp32 with --zero_stage {self.zero_stage}: DeepSpeed then uses another optimizer, "
                "whose state is not known here; give --zero_stage 2 or 3"
            )
        if self.compile and self.zero_stage == 3:
            raise UserError("--compile does not go with --zero_stage 3, whose weights come and go inside a layer")

    @property
    def adds_up_in_float32(self) -> bool:
        """Whether gradients of bf16 weights are kept in float32 between micro-batches."""
        return self.dtype == "bf16" and self.grad_accum_dtype == "fp32"
