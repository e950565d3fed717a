"""Reads weight files: the place of each tensor, single tensors, and errors in one line.

A `.bin` is read with torch's `weights_only`, which unpickles tensors and never runs code.
"""

import contextlib
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from utils.errors import UserError
from utils.files import read_json

DAMAGED = (
    *(OSError, ValueError, KeyError, RuntimeError, ImportError, EOFError),
    *(SafetensorError, pickle.UnpicklingError, StrictDataclassError),
)
# Errors of damaged pickles and archives.
_DAMAGED_FILE = (*DAMAGED, AssertionError, AttributeError, IndexError, TypeError, zipfile.BadZipFile, struct.error)


def tensor_files(folder: Path, flag: str) -> dict[str, Path]:
    """Returns tensor name -> file for all tensors in a folder. Reads indices and headers, no tensors."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, file = folder / f"{name}.index.json", folder / name
        if index.is_file():
            return {tensor: folder / shard for tensor, shard in _shards_of(index, flag).items()}
        if file.is_file():
            with open_weights(file, flag) as tensors:
                return dict.fromkeys(tensors.keys(), file)
    raise UserError(f"{flag}: no model.safetensors or pytorch_model.bin in {folder}; use a Hugging Face model's folder")


def _shards_of(index: Path, flag: str) -> dict[str, str]:
    """Returns tensor name -> file name from an index. Raises UserError for a damaged index or a file elsewhere."""
    shards = read_json(index, flag).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) and x == Path(x).name for x in shards.values()):
        raise UserError(f"{flag}: {index} is damaged (no weight_map of file names); copy it again")
    return shards


def read_tensor(file: Path, name: str, flag: str) -> torch.Tensor:
    """Returns a copy of one tensor of a .safetensors or .bin file, without reading the others."""
    with open_weights(file, flag) as tensors:
        return tensor_of(tensors, name).clone()


def tensor_of(tensors, name: str) -> torch.Tensor:
    """Returns a memory-mapped tensor of what `open_weights` yields: values are read when they are used."""
    return tensors[name] if isinstance(tensors, dict) else tensors.get_tensor(name)


@contextlib.contextmanager
def open_weights(file: Path, flag: str) -> Iterator:
    """Yields the memory-mapped tensors of a file: a safetensors handle, or a dict for a .bin. Raises UserError."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        else:
            mapped = zipfile.is_zipfile(file)
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
                raise ValueError("not a state dict of tensors alone")
            if mapped:
                _check_records(file, tensors)
            yield tensors
    except _DAMAGED_FILE as error:
        raise UserError(f"{flag}: {file} is not readable, truncated or refused: {reason_of(error)}") from error


def _check_records(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless each storage is a record of the archive, which torch does not check with mmap."""
    with zipfile.ZipFile(file) as archive:
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
            raise ValueError("its records are compressed; save it again as safetensors")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("its numbers are big-endian; save it again as safetensors")
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors.values()}
    sizes = sorted(record.file_size for name, record in records.items() if name.startswith("data/"))
    if sorted(filter(None, storages.values())) != [size for size in sizes if size]:
        raise ValueError("its pickle and its records do not agree on the sizes of the tensors")


def reason_of(error: Exception) -> str:
    """Returns the reason of an error and a remedy, in one line; for a pickle, the object that torch refused."""
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"its pickle asks for {code[1]}, which weights do not need and which could run code; use safetensors, "
            "or another source"
        )
    lines = [line.strip() for line in str(error).strip().split("\n")]
    first = " ".join(lines[: 1 + lines[0].endswith(":")]).rstrip(".")
    return f"{first}; copy it again, or use another folder"
