"""The global random streams of a process. Sampling and data order do not use them; dropout and --reward_fn may."""

import random

import numpy as np
import torch


def seed_streams(seed: int, rank: int) -> None:
    """Starts every stream anew, others on each rank."""
    number = int(np.random.SeedSequence([seed % 2**32, rank]).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def random_state() -> dict:
    """All streams, in what JSON can hold."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    cuda = [x.tolist() for x in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    return {
        "python": [version, numbers, gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": cuda,
    }


def set_random_state(state: dict) -> None:
    """Goes on from what `random_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all([torch.tensor(x, dtype=torch.uint8) for x in state["cuda"]])
