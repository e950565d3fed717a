"""Writes tensors to a safetensors file in pieces, without a copy of all of them and without reading back."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from utils.device import on_gpu
from utils.watchdog import report_progress

PIECE = 1 << 26  # bytes per buffer: 64 MB, a power of two because PyTorch rounds pinned memory up to one
_CODES = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


def new_buffer() -> torch.Tensor:
    """Returns uninitialised host memory of PIECE bytes; pinned if there is a GPU, which speeds up its copies."""
    return torch.empty(PIECE, dtype=torch.uint8, pin_memory=on_gpu())


def file_pieces(tensors: dict[str, torch.Tensor], buffers: Iterator[torch.Tensor]) -> Iterator[bytes | torch.Tensor]:
    """Yields the content of a safetensors file: the header, then the data, each piece in the next buffer.

    tensors: contiguous. buffers: uint8 in host memory, which may be reused after their piece is used.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # aligns each tensor
    devices = {x.device for x in tensors.values() if x.is_cuda}
    yield _header(tensors)
    buffer, filled = next(buffers), 0
    for tensor in tensors.values():
        data = tensor.detach().reshape(-1).view(torch.uint8)
        while len(data):
            if filled == len(buffer):
                yield _synchronized(buffer, devices)
                buffer, filled = next(buffers), 0
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
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return piece


def write_file(path: str, pieces: Iterable[bytes | torch.Tensor]) -> dict:
    """Writes a file and waits until it is on the disk. Returns {"bytes", "sha256"} of its content."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hasher:
        for piece in pieces:
            data = memoryview(piece.numpy() if isinstance(piece, torch.Tensor) else piece)
            hashed = hasher.submit(digest.update, data)
            size += file.write(data)
            hashed.result()
            report_progress(f"writing of {os.path.basename(path)}")
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}
