"""Copies of tensors in host memory, from which a GPU reads fast."""

import contextlib
import warnings
from collections.abc import Sequence

import torch

from utils.device import on_gpu

BUFFER = 1 << 30  # bytes
ALIGNMENT = 256  # bytes, a multiple of every dtype's size


def host_copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns a copy of each tensor in host memory, page-locked with a GPU, so that copies to it need no staging.

    The copies share buffers of BUFFER bytes, because PyTorch rounds each page-locked allocation up to a power of two.
    Where the system locks no more memory, ordinary memory takes its place, with a warning.
    """
    sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors]
    left, copies, place = sum(sizes), [], 0
    buffer = torch.empty(0, dtype=torch.uint8)
    for tensor, size in zip(tensors, sizes, strict=True):
        if place + size > len(buffer):
            buffer, place = _host_memory(max(size, min(BUFFER, left))), 0
        held = buffer[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(held.copy_(tensor.detach()))
        place, left = place + size, left - size
    return copies


def _host_memory(size: int) -> torch.Tensor:
    """Returns `size` uninitialised bytes."""
    if on_gpu():
        with contextlib.suppress(RuntimeError):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        warnings.warn("no more host memory can be page-locked: copies to the GPU will be slower", stacklevel=3)
    return torch.empty(size, dtype=torch.uint8)
