"""Weight folders opened without reading weights: where every tensor lies, for safetensors and both `.bin` layouts.

Everything that can be wrong with a download shows here: missing and truncated shards, indices that name absent tensors,
pickles that would run code. Nothing of a tensor is in memory before it is asked for; no torch.
"""

import json
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError
from utils.pickled_tensors import ITEM_BYTES, Places, UnsafePickle, legacy_tensors, zip_tensors

DTYPES = ("float16", "bfloat16", "float32")  # of weights
SAFETENSORS_DTYPES = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "U8": "uint8", "I8": "int8",
    "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool",
}  # fmt: skip
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_LARGEST_HEADER = 100_000_000  # the format's own limit
_DAMAGED = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, struct.error),
    *(zipfile.BadZipFile, RuntimeError),  # an encrypted archive
)


@dataclass(frozen=True)
class Stored:
    """A tensor on the disk: contiguous and little-endian from byte `offset` of `file` on. dtype: torch's name."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return self.numel * ITEM_BYTES[self.dtype]


def open_weights(folder: Path, flag: str) -> dict[str, Stored]:
    """Name of every tensor of a model folder -> its place, in the order of the files. safetensors go before `.bin`.

    Raises UserError, naming `flag`, for files that are missing, truncated, damaged or not to be trusted.
    """
    for single in SINGLE_FILES:
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _sharded(index, flag)
        if (folder / single).is_file():
            return _open_file(folder / single, flag)
    raise UserError(
        f"{flag}: no {' or '.join(SINGLE_FILES)} (or their index) in {folder}; give a model folder in Hugging Face "
        "layout (Meta's own files have to be converted first)"
    )


def read_json(file: Path, flag: str) -> dict:
    """The object in a JSON file. Raises UserError when it cannot be read or is something else."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {file} is not readable or damaged ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{flag}: {file} is damaged (not a JSON object); copy it again")
    return content


def shards_of(index: Path, flag: str) -> dict[str, str]:
    """Name of every tensor in an index -> name of its file. Raises UserError for what is none, or lies elsewhere."""
    shards = read_json(index, flag).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) and x == Path(x).name for x in shards.values()):
        raise UserError(f"{flag}: {index} is damaged (no weight_map of file names); copy it again")
    return shards


def _sharded(index: Path, flag: str) -> dict[str, Stored]:
    shards = shards_of(index, flag)
    missing = [name for name in sorted(set(shards.values())) if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{flag}: {index.parent} lacks {first_names(missing)}, which {index.name} names; copy the folder again"
        )
    found = {}
    for name in sorted(set(shards.values())):
        tensors = _open_file(index.parent / name, flag)
        absent = [tensor for tensor, shard in shards.items() if shard == name and tensor not in tensors]
        if absent:
            raise UserError(
                f"{flag}: {index.name} names tensors that are not in {index.parent / name}: {first_names(absent)}; "
                "index and shards are not of one model, copy the folder again"
            )
        found |= {tensor: place for tensor, place in tensors.items() if shards.get(tensor) == name}
    return found


def _open_file(file: Path, flag: str) -> dict[str, Stored]:
    try:
        with file.open("rb") as stream:
            places = _places(stream, file.suffix)
            size = stream.seek(0, 2)
    except UnsafePickle as error:
        raise UserError(
            f"{flag}: {file} is refused: its pickle asks for {error}, which a file of weights has no use for and which "
            "could run code; get the weights as safetensors, or from a source that you trust"
        ) from error
    except _DAMAGED as error:
        raise UserError(f"{flag}: {file} is not readable, truncated or damaged ({error}); copy it again") from error
    tensors = {}
    for name, (dtype, shape, offset) in places.items():
        tensors[name] = Stored(file, offset, dtype, shape)
        if offset + tensors[name].nbytes > size:
            raise UserError(f"{flag}: {file} is truncated: {name} lies beyond its {size} bytes; copy it again")
    return tensors


def _places(stream: BinaryIO, suffix: str) -> Places:
    if suffix == ".safetensors":
        return _safetensors(stream)
    is_zip = stream.read(4) == b"PK\3\4"
    stream.seek(0)
    return zip_tensors(stream) if is_zip else legacy_tensors(stream)


def _safetensors(stream: BinaryIO) -> Places:
    """The format: 8 bytes of header length, the header as JSON, data without holes."""
    length = int.from_bytes(stream.read(8), "little")
    if length > _LARGEST_HEADER:
        raise ValueError("no safetensors header")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, (start, end) = SAFETENSORS_DTYPES[entry["dtype"]], entry["data_offsets"]
        if end - start != math.prod(entry["shape"]) * ITEM_BYTES[dtype]:
            raise ValueError(f"{name} has {end - start} bytes, which is not its shape's number")
        places[name] = (dtype, tuple(entry["shape"]), 8 + length + start)
    return places


def first_names(names: list[str], limit: int = 5) -> str:
    """The first names in words, and how many more there are: `a, b, c and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
