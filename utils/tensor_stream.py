"""Tensors as streams of chunks: read, hashed and added by threads that overlap, so that memory holds a few chunks.

A stage is a generator; `ahead` gives it a thread. Chunks are of `CHUNK` elements: small enough that float32 work stays
in the processor's cache, large enough that Python's share does not show.
"""

import contextlib
import math
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from utils.errors import UserError
from utils.manifest import TensorHasher
from utils.tensor_files import Stored

T = TypeVar("T")
CHUNK = 1 << 19  # elements
_END = object()


class Chunk(NamedTuple):
    """Elements `start`, `start` + 1, … of tensor `name`, flat; `last` is True on the tensor's last chunk."""

    name: str
    start: int
    data: torch.Tensor
    last: bool


def ahead(items: Generator[T], depth: int = 4) -> Iterator[T]:
    """The items, made by another thread while the caller works on earlier ones; at most `depth` wait in between.

    An exception of `items` is raised here; closing this generator stops and closes that one too. It pays where the
    work leaves Python's lock alone, as reading, hashing and torch do.
    """
    waiting: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def offer(item) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return

    def produce() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    offer(item)
                    if stopped.is_set():
                        return
        finally:
            offer(_END)

    with ThreadPoolExecutor(1) as pool:
        producer = pool.submit(produce)
        try:
            while (item := waiting.get()) is not _END:
                yield item
            producer.result()
        finally:
            stopped.set()


def read_chunks(tensors: dict[str, Stored], names: Iterable[str], flag: str) -> Generator[Chunk]:
    """The named tensors, one after the other, as they are on the disk. UserError when a file cannot be read."""
    file = None
    try:
        for name in names:
            stored = tensors[name]
            if file is None or file.name != str(stored.file):
                if file is not None:
                    file.close()
                file = open(stored.file, "rb", buffering=0)  # noqa: SIM115 -- one file serves many tensors
            file.seek(stored.offset)
            for start in range(0, max(stored.numel, 1), CHUNK):
                data = torch.empty(min(CHUNK, stored.numel - start), dtype=getattr(torch, stored.dtype))
                _fill(file, as_bytes(data))
                yield Chunk(name, start, data, start + CHUNK >= stored.numel)
    except OSError as error:
        raise UserError(f"{flag}: cannot read {stored.file} ({error.strerror or error}); copy it again") from error
    finally:
        if file is not None:
            file.close()


def _fill(file, view: memoryview) -> None:
    while len(view):
        count = file.readinto(view)
        if not count:
            raise OSError("it has become shorter")
        view = view[count:]


def as_bytes(data: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(data.view(torch.uint8).numpy()) if data.numel() else memoryview(b"")


def hashed(chunks: Generator[Chunk], hasher: TensorHasher, dtype: str | None = None) -> Generator[Chunk]:
    """The chunks, in `dtype` where that is given, each passed through the hasher."""
    with contextlib.closing(chunks):
        for chunk in chunks:
            data = chunk.data.to(getattr(torch, dtype)) if dtype else chunk.data
            hasher.add(chunk.name, as_bytes(data), chunk.last)
            yield chunk._replace(data=data)


def check_range(values: torch.Tensor, dtype: torch.dtype, name: str, where: str) -> None:
    """Raises UserError when float32 values of tensor `name` are not finite, or would not be in `dtype`.

    where: whose tensor it is, for the message.
    """
    if not values.numel():
        return
    low, high = (bound.item() for bound in torch.aminmax(values))  # both NaN where one value is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name} of {where} holds NaN or Inf: the files are damaged, copy them again")
    if max(-low, high) > torch.finfo(dtype).max:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} of {where} has values beyond the range of {kind}: give --dtype float32")
