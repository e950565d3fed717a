"""Where a process computes. Every module asks here; none asks `torch.cuda.is_available()`."""

import os

import torch


def on_gpu() -> bool:
    """Whether this process uses a GPU: it sees one, and DS_ACCELERATOR, DeepSpeed's own switch, does not say "cpu"."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its launcher-given GPU, else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu() else torch.device("cpu")


def synchronize() -> None:
    """Waits until the GPU has done what it was given; on a CPU there is nothing to wait for."""
    if on_gpu() and torch.cuda.is_initialized():
        torch.cuda.synchronize(device())
