"""Device of this process. All modules use this one instead of `torch.cuda.is_available()`."""

import os
import resource

import torch


def on_gpu() -> bool:
    """Whether this process uses a GPU: one is visible, and DeepSpeed's variable DS_ACCELERATOR is not "cpu"."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def device() -> torch.device:
    """Returns the GPU with index LOCAL_RANK, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu() else torch.device("cpu")


def synchronize() -> None:
    """Waits for the GPU's queued work; does nothing on a CPU."""
    if on_gpu() and torch.cuda.is_initialized():
        torch.cuda.synchronize(device())


def peak_memory() -> int:
    """Returns the most bytes that this process has held so far: of its GPU, on a CPU of the host."""
    if on_gpu():
        return torch.cuda.max_memory_reserved(device())
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
