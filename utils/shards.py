"""Safetensors shards written as a stream: no shard, and no tensor, has to be in memory."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from utils.tensor_files import SAFETENSORS_DTYPES

_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
_FLUSH_EVERY = 256 << 20  # bytes: so the disk is never idle, and little is left to wait for at the end


class ShardWriter:
    """Writes tensors one after the other: `start`, then `write` its bytes in order; `finish` after the last.

    folder: where the shards go; one alone is `model.safetensors`, several get numbers and an index. max_shard_bytes:
    of a shard's data; a larger tensor has a shard to itself. names: all that may come, for the room that headers need:
    a header is written last, when all sizes are known, in front of its data. OSError when the disk is full or fails.
    """

    def __init__(self, folder: Path, max_shard_bytes: int, names: Iterable[str]):
        self._folder = folder
        self._max_bytes = max_shard_bytes
        # 192: more than dtype, shape and offsets take. Readers like data that start at a multiple of 8.
        self._data_start = -(-(64 + sum(len(json.dumps(name)) + 192 for name in names)) // 8) * 8
        self._shards: list[dict[str, dict]] = []
        self._file: BinaryIO | None = None
        self._written = self._flushed = 0
        self._flusher = ThreadPoolExecutor(1)
        self._flushes: list[Future] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self._flusher.shutdown()
        if self._file is not None:
            self._file.close()

    def start(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        """The bytes that follow are this tensor's."""
        if self._file is None or (self._written and self._written + nbytes > self._max_bytes):
            self._end_shard()
            self._shards.append({})
            self._file = self._part(len(self._shards)).open("wb")
            self._file.seek(self._data_start)
            self._written = self._flushed = 0
        offsets = [self._written, self._written + nbytes]
        self._shards[-1][name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": offsets}

    def write(self, data: memoryview) -> None:
        """The next bytes of the tensor that was started last."""
        self._file.write(data)
        self._written += len(data)
        if self._written - self._flushed >= _FLUSH_EVERY:
            self._flushed = self._written
            self._flushes.append(self._flusher.submit(os.fsync, self._file.fileno()))

    def finish(self) -> int:
        """Ends the last shard, names all of them and writes the index. Returns the number of shards."""
        self._end_shard()
        for flush in self._flushes:
            flush.result()
        total = len(self._shards)
        names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        if total == 1:
            names = ["model.safetensors"]
        for number, name in enumerate(names, start=1):
            os.rename(self._part(number), self._folder / name)
        if total > 1:
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(self._index(names), indent=2))
        return total

    def _index(self, names: list[str]) -> dict:
        offsets = [entry["data_offsets"] for shard in self._shards for entry in shard.values()]
        shard_of = {tensor: name for shard, name in zip(self._shards, names, strict=True) for tensor in shard}
        return {"metadata": {"total_size": sum(end - start for start, end in offsets)}, "weight_map": shard_of}

    def _part(self, number: int) -> Path:
        return self._folder / f"model-{number:05d}.safetensors"

    def _end_shard(self) -> None:
        if self._file is None:
            return
        length = self._data_start - 8
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shards[-1]}).encode()
        assert len(header) <= length
        self._file.seek(0)
        self._file.write(length.to_bytes(8, "little") + header.ljust(length))
        self._file.flush()
        self._flushes.append(self._flusher.submit(_flush_and_close, self._file))
        self._file = None


def _flush_and_close(file: BinaryIO) -> None:
    os.fsync(file.fileno())
    file.close()
