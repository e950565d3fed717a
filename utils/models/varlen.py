"""Causal attention of rows that stand end to end, on a GPU: PyTorch's own flash attention of rows of any length."""

import inspect
from collections.abc import Callable

import torch

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

MOST_SIZE = 192  # of a head; above, the backward pass needs more shared memory than consumer cards have


def options_of(function: Callable | None) -> dict | None:
    """Arguments by which this `varlen_attn` is causal and heads may share keys; None where it lacks them.

    PyTorch 2.11 takes heads that share keys as they are; `enable_gqa` came after it, and is a check of shapes alone.
    """
    names = inspect.signature(function).parameters if function else ()
    if not {"window_size", "scale"} <= set(names):
        return None
    return {"window_size": (-1, 0)} | ({"enable_gqa": True} if "enable_gqa" in names else {})


OPTIONS = options_of(varlen_attn)


def takes_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether `attend` takes such states: bf16, on an NVIDIA GPU of compute capability 8.0 (Ampere) or above."""
    if device.type != "cuda" or torch.version.hip or dtype != torch.bfloat16 or OPTIONS is None:
        return False
    built = torch.backends.cuda.is_flash_attention_available()
    return (
        built and torch.cuda.get_device_capability(device) >= (8, 0) and head_size % 8 == 0 and head_size <= MOST_SIZE
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    """Each token attends to those of its row up to itself: [1, heads, tokens, size] each -> [1, tokens, heads, size].

    key, value: as many heads, or fewer, which query heads share. ends: int32 [rows + 1], 0 and where each row ends;
    longest: tokens of the longest row.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, **OPTIONS)[None]
