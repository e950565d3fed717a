"""Global random streams of a process. Dropout and --reward_fn may use them; sampling and data order do not."""

import random
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from utils.device import on_gpu
from utils.schema import Schema, checked

_Word = Annotated[int, Field(ge=0, lt=2**32)]
_Place = Annotated[int, Field(ge=0, le=624)]
_Listed = Field(strict=False)  # a tuple, which JSON reads back as a list


def _hexadecimal(*sizes: int):
    return Annotated[str, Field(pattern="^([0-9a-f]{2})+$", min_length=2 * min(sizes), max_length=2 * max(sizes))]


class _Streams(Schema):
    """Python and NumPy: 624 words of a Mersenne twister, the place in it, the second of a pair of normal numbers."""

    python: Annotated[tuple[Literal[3], Annotated[list[_Word], Field(min_length=625)], float | None], _Listed]
    numpy: Annotated[tuple[Literal["MT19937"], _hexadecimal(624 * 4), _Place, Literal[0, 1], float], _Listed]
    torch: _hexadecimal(5056)
    gpu: _hexadecimal(16, 1024) | None = None


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


def check_random_state(state: dict, place: str) -> None:
    """Raises ValueError, which names `place`, unless `state` is a result of `random_state`."""
    checked(_Streams, state, place)
    version, numbers, gauss = state["python"]
    try:
        random.Random().setstate((version, tuple(numbers), gauss))
        torch.Generator().set_state(_bytes(state["torch"]))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{place}: {str(error).splitlines()[0]}") from None


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
