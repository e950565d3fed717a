"""Writes tensors to a safetensors file in pieces, without a copy of all of them and without reading back."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import torch

from utils.device import device, on_gpu
from utils.watchdog import report_progress

Files = dict[str, Iterable[bytes | torch.Tensor]]  # name -> content
_CODES = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


def side_stream() -> torch.cuda.Stream | None:
    """Returns the stream of copies from the GPU, which waits for the work queued so far; None on a CPU."""
    if not on_gpu():
        return None
    stream = _copy_stream(device())
    stream.wait_stream(torch.cuda.current_stream(device()))
    return stream


@functools.cache
def _copy_stream(gpu: torch.device) -> torch.cuda.Stream:
    # PyTorch hands out 32 streams per priority in turn. Those of normal priority may be recording a CUDA graph.
    return torch.cuda.Stream(gpu, priority=-1)


def file_pieces(tensors: dict[str, torch.Tensor], buffer: torch.Tensor) -> Iterator[bytes | torch.Tensor]:
    """Yields the content of a safetensors file: the header, then the data, each piece in the buffer.

    tensors: contiguous; those on a GPU are copied in the current stream. buffer: uint8 in host memory.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # aligns each tensor
    devices = {x.device for x in tensors.values() if x.is_cuda}
    yield _header(tensors)
    filled = 0
    for tensor in tensors.values():
        data = tensor.detach().reshape(-1).view(torch.uint8)
        while len(data):
            if filled == len(buffer):
                yield _synchronized(buffer, devices)
                filled = 0
            part = data[: len(buffer) - filled]
            buffer[filled : filled + len(part)].copy_(part, non_blocking=True)
            filled, data = filled + len(part), data[len(part) :]
    yield _synchronized(buffer[:filled], devices)


def _header(tensors: dict[str, torch.Tensor]) -> bytes:
    """Returns 8 bytes of header length, then JSON, padded so that the data starts at a multiple of 8."""
    entries, end = {}, 0
    for name, x in tensors.items():
        start, end = end, end + x.nbytes
        entries[name] = {"dtype": _CODES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _synchronized(piece: torch.Tensor, devices: set[torch.device]) -> torch.Tensor:
    """Returns the piece once the copies from these GPUs are complete."""
    for gpu in devices:
        torch.cuda.current_stream(gpu).synchronize()
    return piece


def write_files(folder: str, files: Files, on_read: Callable[[], None] = lambda: None) -> dict[str, dict]:
    """Writes files and waits until they are on the disk. Returns name -> {"bytes", "sha256"} of the content.

    on_read: called once the last piece is in the system's page cache, before the wait for the disk.
    """
    with contextlib.ExitStack() as stack:  # closed at the end, as network file systems wait for the disk in `close`
        opened = {name: stack.enter_context(open(os.path.join(folder, name), "wb")) for name in files}
        entries = {name: write_file(file, files[name]) for name, file in opened.items()}
        on_read()
        for name, file in opened.items():
            os.fsync(file.fileno())
            report_progress(f"writing of {name}")
    return entries


def write_file(file: BinaryIO, pieces: Iterable[bytes | torch.Tensor]) -> dict:
    """Writes to a file. Returns {"bytes", "sha256"} of its content."""
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as hasher:
        for piece in pieces:
            data = memoryview(piece.numpy() if isinstance(piece, torch.Tensor) else piece)
            hashed = hasher.submit(digest.update, data)
            size += file.write(data)
            hashed.result()
            report_progress(f"writing of {os.path.basename(file.name)}")
    file.flush()
    return {"bytes": size, "sha256": digest.hexdigest()}
