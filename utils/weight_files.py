"""Weight files as torch and safetensors read them: which tensor is where, one of them alone, and why not.

A `.bin` goes through torch's `weights_only`: tensors are unpickled from it, never code.
"""

import contextlib
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from utils.errors import UserError
from utils.tensor_files import shards_of

DAMAGED = (
    *(OSError, ValueError, KeyError, RuntimeError, ImportError, EOFError),
    *(SafetensorError, pickle.UnpicklingError, StrictDataclassError),
)


def tensor_files(folder: Path, flag: str) -> dict[str, Path]:
    """Name of every tensor in the folder -> the file that holds it. Reads indices and headers, no tensors."""
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            return {name: folder / file for name, file in shards_of(index, flag).items()}
    for file in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        if file.is_file():
            with _weights(file, flag) as tensors:
                return dict.fromkeys(tensors.keys(), file)
    raise UserError(f"{flag}: no model.safetensors or pytorch_model.bin in {folder}; give the folder of a whole model")


def read_tensor(file: Path, name: str, flag: str) -> torch.Tensor:
    """One tensor out of a .safetensors or .bin file; the rest stays on the disk."""
    with _weights(file, flag) as tensors:
        return tensors.get_tensor(name) if file.suffix == ".safetensors" else tensors[name].clone()


@contextlib.contextmanager
def _weights(file: Path, flag: str) -> Iterator:
    """Lazy mapping of a weight file. Only tensors are unpickled from a .bin, never code."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
                raise ValueError("not a state dict of tensors alone")
            yield tensors
    except DAMAGED as error:
        raise UserError(f"{flag}: {file} is not readable, truncated or refused: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """What went wrong and what to do, on one line. torch names what a pickle asks for that is no tensor."""
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"its pickle asks for {code[1]}, which a file of weights has no use for and which could run code; get the "
            "weights as safetensors, or from a source that you trust"
        )
    lines = [line.strip() for line in str(error).strip().split("\n")]
    first = " ".join(lines[: 1 + lines[0].endswith(":")]).rstrip(".")
    return f"{first}; copy it again, or give another folder"
