"""Reads weight files: the place of each tensor, single tensors, and errors in one line.

A `.bin` is read with torch's `weights_only`, which unpickles tensors and never runs code.
"""

import contextlib
import math
import mmap
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from safetensors import safe_open

from utils.errors import UserError
from utils.files import first_names, read_json
from utils.schema import Schema, checked

# Names in the pickle of a state dict, as pickletools prints them.
_IN_STATE_DICTS = re.compile(
    r"collections OrderedDict|torch [A-Z]\w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch\.storage UntypedStorage|torch float8_\w+"
)
_MAX_ITEMS = 1000
_UNTYPED = 0.5  # stands for the class UntypedStorage, which may be in tuples only: a call of it takes any memory


class _Index(Schema):
    weight_map: dict[str, Annotated[str, Field(pattern="^[!-.0-~]{1,200}$")]] = Field(min_length=1)  # names of files


class Stored(NamedTuple):
    """Place, dtype (torch's name) and shape of a tensor in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_file(folder: Path) -> Path | None:
    """Returns a model's weight file, or the index of its weight files, as transformers chooses; None without either."""
    names = (f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def tensor_files(folder: Path, flag: str) -> dict[str, Path]:
    """Returns tensor name -> file for all tensors in a folder. Reads indices and headers, no tensors."""
    file = weight_file(folder)
    if file and file.suffix == ".json":
        files = {tensor: folder / shard for tensor, shard in shards_of(file, flag).items()}
        if missing := sorted({shard.name for shard in files.values() if not shard.is_file()}):
            raise UserError(
                f"{flag}: {folder} lacks {first_names(missing)}, which its index names; copy the folder again"
            )
        return files
    if file:
        with open_weights(file, flag) as tensors:
            return dict.fromkeys(tensors.keys(), file)
    raise UserError(f"{flag}: no model.safetensors or pytorch_model.bin in {folder}; use a Hugging Face model's folder")


def stored_tensors(folder: Path, flag: str, contiguous: bool = False) -> dict[str, Stored]:
    """Returns tensor name -> place of all tensors in a folder, file by file, in the order of the files.

    Opens every file, and so raises UserError for one that is missing, damaged or refused. contiguous: refuse others.
    """
    file_of, found = tensor_files(folder, flag), {}
    for file in sorted(set(file_of.values())):
        outline: dict[str, Stored] = {}
        with open_weights(file, flag) as tensors:
            for name in tensors if isinstance(tensors, dict) else tensors.offset_keys():
                tensor = tensor_of(tensors, name)
                if contiguous and not tensor.is_contiguous():
                    raise ValueError(f"{name} is not contiguous; save it again as safetensors")
                outline[name] = Stored(file, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if absent := [name for name in file_of if file_of[name] == file and name not in outline]:
            raise UserError(f"{flag}: the index names tensors that are not in {file}: {first_names(absent)}; copy both")
        found |= {name: place for name, place in outline.items() if file_of.get(name) == file}
    return found


def shards_of(index: Path, flag: str) -> dict[str, str]:
    """Returns tensor name -> file name from an index. Raises UserError for a damaged index or a file elsewhere."""
    content = read_json(index, flag)
    try:
        return checked(_Index, content).weight_map
    except ValueError as error:
        raise UserError(f"{flag}: {index} is damaged (no weight_map of file names); copy it again") from error


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
            records = _check_pickles(file)
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(records, list))
            if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
                raise ValueError("not a state dict of tensors alone")
            _check_tensors(tensors, records)
            yield tensors
    except Exception as error:  # torch, zipfile and pickletools raise all kinds
        raise UserError(f"{flag}: {file} is not readable, truncated or refused: {reason_of(error)}") from error


def _check_pickles(file: Path) -> list[int] | int:
    """Returns the sizes of an archive's storages in the order of the file; before torch 1.6, the number of storages.

    Raises an error for big-endian or compressed records, and for pickles that could take much more memory than it.
    """
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\3\4":  # what torch goes by
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for _ in ("magic number", "version", "system"):
                    _check_pickle(content)
                _check_pickle(content, most=len(content))
                return len(_check_pickle(content))
    with zipfile.ZipFile(file) as archive:
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
            raise ValueError("its records are compressed; save it again as safetensors")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("its numbers are big-endian; save it again as safetensors")
        _check_pickle(archive.read(records["data.pkl"]))
    data = [record for name, record in records.items() if name.startswith("data/") and record.file_size]
    return [record.file_size for record in sorted(data, key=lambda record: record.header_offset)]


def _check_pickle(content: mmap.mmap | bytes, most: float = math.inf) -> set[str]:
    """Returns the texts in a pickle. Raises an error unless it asks for nothing but what state dicts are made of, in
    tuples of few items: torch's `weights_only` also calls bytearray(10**11), and hashes tuples in tuples, without end.

    most: the largest number in it. Before torch 1.6, storages are allocated by the number of their elements.
    """
    texts, marks, memo = set(), [], {}
    stack = []  # of each object the number of items, those of tuples in tuples included
    for code, value, _ in pickletools.genops(content):
        _check_value(code.name, value, most)
        if code.name == "BINUNICODE":
            texts.add(value)
        if "PUT" in code.name:
            memo[value] = stack[-1]
        taken = len(stack) - len(code.stack_before)
        if pickletools.markobject in code.stack_before:
            taken = marks.pop() - code.stack_before.index(pickletools.markobject)
        items = _UNTYPED if value == "torch.storage UntypedStorage" else 1
        if code.name.startswith("TUPLE"):
            items += sum(stack[taken:])
        elif _UNTYPED in stack[taken:]:
            raise ValueError("GLOBAL torch.storage.UntypedStorage")
        if items > _MAX_ITEMS:
            raise ValueError("its pickle holds a tuple of too many items")
        del stack[taken:]
        if pickletools.markobject in code.stack_after:
            marks.append(len(stack))
        else:
            stack.extend([memo[value] if "GET" in code.name else items] * len(code.stack_after))
    return texts


def _check_value(code: str, value, most: float) -> None:
    """Raises ValueError for a name that state dicts do not need, and for a number above `most`."""
    if code == "STACK_GLOBAL":
        raise ValueError("its pickle is of protocol 4 or later; save it again as safetensors")
    if code in ("GLOBAL", "INST") and not _IN_STATE_DICTS.fullmatch(str(value)):
        raise ValueError(f"GLOBAL {'.'.join(str(value).split())}")
    if isinstance(value, int) and value > most:
        raise ValueError("its pickle asks for more elements than the file has bytes")


def _check_tensors(tensors: dict[str, torch.Tensor], records: list[int] | int) -> None:
    """Raises ValueError for tensors that are not plain, and unless the storages are the `records` of `_check_pickles`.

    torch does not check these with mmap, and before torch 1.6 it does not notice if they lack one.
    """
    storages = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            raise ValueError(f"{name!r} is not a plain tensor with a name")
        storage = tensor.untyped_storage()
        if tensor.nbytes > storage.nbytes():
            raise ValueError(f"{name} is not contiguous; save it again as safetensors")
        storages[storage._cdata if isinstance(records, int) else storage.data_ptr()] = storage.nbytes()
        tensor.requires_grad_(False)
    found = [size for _, size in sorted(storages.items()) if size] if isinstance(records, list) else len(storages)
    if found != records:
        raise ValueError("its pickle and its records do not agree on the sizes of the tensors")


def reason_of(error: Exception) -> str:
    """Returns the reason of an error and a remedy, in one line; for a pickle, the object that torch refused."""
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"its pickle asks for {code[1]}, which weights do not need and which could run code; use safetensors, "
            "or another source"
        )
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).split("\n")]
    first = " ".join(lines[: 1 + lines[0].endswith(":")]).rstrip(".")
    return f"{first}; copy it again, or use another folder"
