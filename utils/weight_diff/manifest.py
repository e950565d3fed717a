"""`weight_manifest.json` beside weights: SHA-256 of every tensor, and the sum of all parameters."""

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from utils.errors import UserError
from utils.files import read_json, write_json
from utils.schema import Sha256, checked
from utils.weight_diff.published import DTYPES

FILE = "weight_manifest.json"


@dataclass(frozen=True)
class Hashes:
    """SHA-256, in hexadecimal, of each tensor's bytes in `dtype` (row-major, little-endian)."""

    dtype: Literal[DTYPES]
    sha256: dict[str, Sha256]


@dataclass(frozen=True)
class Manifest:
    """total: sum of the recovered model (see recover.recover). raw, diff: only in the folder of a diff."""

    total: Annotated[float, Field(strict=True, allow_inf_nan=False)]
    tuned: Hashes
    raw: Hashes | None = None
    diff: Hashes | None = None

    def __post_init__(self):
        if (self.raw is None) != (self.diff is None):
            raise ValueError("it has only one of raw and diff")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `weight_manifest.json`."""
    write_json(str(folder / FILE), {key: value for key, value in asdict(manifest).items() if value is not None})


def read_manifest(folder: Path, flag: str) -> Manifest | None:
    """Returns the folder's manifest, None if it has none. Raises UserError if it is damaged."""
    if not os.path.lexists(folder / FILE):
        return None
    return checked(Manifest, read_json(folder / FILE, flag, Manifest))


class TensorHasher:
    """Collects hashes of CPU tensors in `found`. UserError(mismatch.format(name)) if one differs from `expected`."""

    def __init__(self, expected: dict[str, str] | None = None, mismatch: str = "{}"):
        self.found: dict[str, str] = {}
        self._expected = expected
        self._mismatch = mismatch

    def __call__(self, named: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        """Hashes a tensor with its name, and returns both."""
        name, tensor = named
        self.found[name] = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        if self._expected is not None and self._expected.get(name) != self.found[name]:
            raise UserError(self._mismatch.format(name))
        return named
