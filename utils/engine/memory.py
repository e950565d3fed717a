"""How much memory a process may still use, and copies of tensors in host memory from which a GPU reads fast."""

import contextlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from utils.device import device, on_gpu
from utils.distributed import any_rank, max_ranks, world_size
from utils.models.split import whole_shape

ROOM = 0.9  # share of a GPU's memory that plans and automatic sizes may use
BUFFER = 1 << 30  # bytes
ALIGNMENT = 256  # bytes, a multiple of every dtype's size

# Control groups by the controllers that /proc/self/cgroup names, "" for version 2: the files with the limit and the
# usage, and the entry of memory.stat for file pages, which the kernel frees when memory is needed.
_GROUPS = {
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "": ("memory.max", "memory.current", "inactive_file"),
}


def free_memory() -> int:
    """Returns the bytes that this process may still use on its device: GPU memory, on a CPU host memory."""
    if device().type == "cuda":
        # Memory that PyTorch's allocator caches is free as well.
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free_host_memory()


def fits_whole(model: nn.Module) -> bool:
    """Whether each rank has free memory for 1.5 times the whole weights of a model. Collective."""
    needed = 1.5 * sum(whole_shape(x).numel() * x.itemsize for x in model.parameters())
    return not any_rank(needed > free_memory(), device())


def device_room() -> int | None:
    """Returns the bytes that each rank may still use of ROOM of its GPU's memory, None on a CPU. Collective."""
    if device().type == "cpu":
        return None
    spare = free_memory() - int((1 - ROOM) * device_memory())
    return -max_ranks(-spare, device())


def device_memory() -> int:
    """Returns the bytes of this process's GPU; on a CPU, of the host's memory."""
    return torch.cuda.mem_get_info()[1] if device().type == "cuda" else psutil.virtual_memory().total


def host_copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns copies in host memory, in shared page-locked buffers with a GPU, so that copies to it need no staging."""
    sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors]
    left, copies, place = sum(sizes), [], 0
    buffer = torch.empty(0, dtype=torch.uint8)
    for tensor, size in zip(tensors, sizes, strict=True):
        if place + size > len(buffer):
            buffer, place = page_locked(max(size, min(BUFFER, left))), 0
        held = buffer[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(held.copy_(tensor.detach()))
        place, left = place + size, left - size
    return copies


def page_locked(size: int) -> torch.Tensor:
    """Returns `size` uninitialised bytes of host memory; page-locked if there is a GPU, which speeds up its copies."""
    if on_gpu():
        with contextlib.suppress(RuntimeError):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        warnings.warn("no more host memory can be page-locked: copies to the GPU will be slower", stacklevel=3)
    return torch.empty(size, dtype=torch.uint8)


def free_host_memory() -> int:
    """Returns the bytes of host memory that each rank of this node may still use."""
    free = min(psutil.virtual_memory().available, group_room())
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def group_room(membership: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float:
    """Returns the bytes that the limits of a job or container leave to this process; infinite without a limit."""
    room = float("inf")
    lines = Path(membership).read_text().splitlines() if os.path.exists(membership) else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers in _GROUPS:
            base = Path(root, controllers)
            inside = base / path.lstrip("/")
            for folder in (inside, *inside.parents):  # a parent group may have the lower limit
                if folder.is_relative_to(base):
                    room = min(room, _room(folder, *_GROUPS[controllers]))
    return room


def _room(folder: Path, limit: str, usage: str, cache: str) -> float:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / limit).read_text()) - int((folder / usage).read_text()) + int(stat[cache])
    except (OSError, ValueError, KeyError):  # no such group here, or "max": no limit
        return float("inf")
