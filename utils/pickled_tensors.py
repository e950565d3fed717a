"""Where the tensors lie in a `.bin` file of PyTorch, zip layout or the older pickle one, without running its pickle.

The pickle is read by an unpickler that knows four harmless functions and the names of storages, and refuses all else,
so nothing in it can run. It yields dtypes, shapes and places; the data are then read straight from the file. Mapping
the file (torch.load with mmap) would do for the zip layout alone, and mapped pages count as resident memory.
"""

import collections
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

Places = dict[str, tuple[str, tuple[int, ...], int]]  # name -> (dtype, shape, offset in the file)

ITEM_BYTES = {
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "uint8": 1, "int8": 1, "int16": 2, "int32": 4,
    "int64": 8, "bool": 1,
}  # fmt: skip
_STORAGE_DTYPES = {
    "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "FloatStorage": "float32", "DoubleStorage": "float64",
    "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32",
    "LongStorage": "int64", "BoolStorage": "bool",
}  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP_LOCAL_HEADER = struct.Struct("<26x2H")  # its last fields: lengths of file name and extra field


class UnsafePickle(Exception):
    """A pickle asks for something besides tensors; the message is its dotted name."""


class _Storage(NamedTuple):
    key: str
    dtype: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    start: int  # elements
    shape: tuple[int, ...]


def _rebuild_tensor(storage: _Storage, start: int, shape: tuple[int, ...], stride: tuple[int, ...], *_) -> _Tensor:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and step != expected:
            raise ValueError("a tensor that is not contiguous; save it again as safetensors")
        expected *= size
    return _Tensor(storage, start, tuple(shape))


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


class _Skeleton(pickle.Unpickler):
    """Reads a state dict's outline: `_Tensor`s in place of tensors."""

    def find_class(self, module: str, name: str):
        if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if (module, name) not in _KNOWN:
            raise UnsafePickle(f"{module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: tuple) -> _Storage:
        _, dtype, key, _, numel, *view = pid
        if any(view):
            raise ValueError("a view of another storage; save it again as safetensors")
        return _Storage(str(key), dtype, numel)

    def load(self):
        try:
            return super().load()
        except pickle.UnpicklingError as error:
            raise ValueError(str(error)) from error


def zip_tensors(stream: BinaryIO) -> Places:
    """Tensors of a file by today's torch.save: a zip archive of `data.pkl` and a stored record per storage.

    Raises UnsafePickle, and ValueError or another plain exception when the file is damaged.
    """
    with zipfile.ZipFile(stream) as archive:
        records = {record.filename: record for record in archive.infolist()}
        (outline,) = (name for name in records if name.endswith("/data.pkl"))
        with archive.open(outline) as pickled:
            state = _Skeleton(pickled).load()
    offsets = {}
    for name, record in records.items():
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        stream.seek(record.header_offset)
        lengths = _ZIP_LOCAL_HEADER.unpack(stream.read(_ZIP_LOCAL_HEADER.size))
        offsets[name] = record.header_offset + _ZIP_LOCAL_HEADER.size + sum(lengths)
    folder = outline.removesuffix("data.pkl")
    return _places(state, lambda storage: offsets[f"{folder}data/{storage.key}"])


def legacy_tensors(stream: BinaryIO) -> Places:
    """Tensors of a file by torch.save before 1.6: five pickles, then each storage behind its number of elements.

    Raises as `zip_tensors` does.
    """
    if _Skeleton(stream).load() != _LEGACY_MAGIC:
        raise ValueError("no file of torch.save")
    for _ in ("protocol version", "byte order and sizes"):
        _Skeleton(stream).load()
    state = _Skeleton(stream).load()
    storages = {tensor.storage.key: tensor.storage for tensor in _tensors(state).values()}
    offsets = {}
    for key in _Skeleton(stream).load():
        count = stream.read(8)
        if len(count) < 8:
            raise EOFError("it ends before its last storage")
        numel = int.from_bytes(count, "little")
        if numel != storages[key].numel:
            raise ValueError(f"storage {key} has {numel} elements, not {storages[key].numel}")
        offsets[key] = stream.tell()
        stream.seek(numel * ITEM_BYTES[storages[key].dtype], 1)
    return _places(state, lambda storage: offsets[storage.key])


def _tensors(state) -> dict[str, _Tensor]:
    if not isinstance(state, dict) or not all(isinstance(tensor, _Tensor) for tensor in state.values()):
        raise ValueError("not a state dict of tensors alone")
    return state


def _places(state, offset_of: Callable[[_Storage], int]) -> Places:
    places = {}
    for name, (storage, start, shape) in _tensors(state).items():
        if start + math.prod(shape) > storage.numel:
            raise ValueError(f"{name} is larger than its storage")
        places[name] = (storage.dtype, shape, offset_of(storage) + start * ITEM_BYTES[storage.dtype])
    return places
