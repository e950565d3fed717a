"""Causal attention of joined rows of any length on a GPU, by PyTorch's own flash attention."""

import inspect
from collections.abc import Callable

import torch

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

MAX_SIZE = 192  # of a head; larger ones need more shared memory in the backward pass than consumer GPUs have


def options_of(function: Callable | None) -> dict | None:
    """Returns the arguments of `varlen_attn` for causal attention with shared key heads, None if it lacks them."""
    names = inspect.signature(function).parameters if function else ()
    if not {"window_size", "scale"} <= set(names):
        return None
    return {"window_size": (-1, 0)} | ({"enable_gqa": True} if "enable_gqa" in names else {})


OPTIONS = options_of(varlen_attn)


def takes_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether `attend` supports these states: bf16 on an NVIDIA GPU of compute capability 8.0 (Ampere) or higher."""
    if device.type != "cuda" or torch.version.hip or dtype != torch.bfloat16 or OPTIONS is None:
        return False
    built = torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0) and head_size % 8 == 0 and head_size <= MAX_SIZE


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    """Causal attention within each row: [1, heads, tokens, size] each -> [1, tokens, heads, size].

    ends: int32 [rows + 1], 0 and the end of each row; longest: tokens of the longest row.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, **OPTIONS)[None]
