"""Global random streams of a process. Dropout and --reward_fn may use them; sampling and data order do not."""

import random

import numpy as np
import torch

from utils.device import on_gpu


def seed_streams(seed: int, rank: int) -> None:
    """Seeds the streams of Python, NumPy and PyTorch, differently on each rank."""
    number = int(np.random.SeedSequence([seed % 2**32, rank]).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def random_state() -> dict:
    """Returns the state of all streams, as JSON; of GPUs only this rank's."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "python": [version, numbers, gauss],
        "numpy": [kind, keys.tobytes().hex(), *rest],
        "torch": _hex(torch.get_rng_state()),
        "gpu": _hex(torch.cuda.get_rng_state()) if on_gpu() else None,
    }


def set_random_state(state: dict) -> None:
    """Restores the streams from a result of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(bytes.fromhex(keys), dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if on_gpu() and state.get("gpu"):
        torch.cuda.set_rng_state(_bytes(state["gpu"]))


def _hex(x: torch.Tensor) -> str:
    return x.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
