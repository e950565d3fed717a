"""Large files read and written past the page cache (O_DIRECT): each byte is used once, so that copying it there, and
throwing other files' pages out for it, would cost more than the disk does.

The disk then moves whole blocks between aligned memory and aligned places; what is asked for need not be aligned.
File systems that cannot do this (some in memory or on a network) are used through the cache.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

BLOCK = 4096  # bytes: a multiple of every disk's block
_DIRECT = getattr(os, "O_DIRECT", 0)  # not every system has it
_BUFFER = 4 << 20  # bytes of one write


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _transfer(function: Callable[[int, memoryview, int], int], file: int, view: memoryview, place: int) -> int:
    """`function` of the arguments behind it: bytes moved. Through the cache from now on if the file refuses."""
    try:
        return function(file, view, place)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, 0)  # takes O_DIRECT away
        return function(file, view, place)


def _aligned(nbytes: int) -> torch.Tensor:
    """Uninitialised bytes that start at a multiple of BLOCK in memory."""
    memory = torch.empty(nbytes + BLOCK, dtype=torch.uint8)
    return memory[-memory.data_ptr() % BLOCK :][:nbytes]


def _read_into(file: int, view: memoryview, place: int) -> int:
    return os.preadv(file, [view], place)


def whole_blocks(nbytes: int) -> int:
    """At least `nbytes`, a multiple of BLOCK."""
    return -(-nbytes // BLOCK) * BLOCK


class DirectReader:
    """Reads pieces of one file. OSError when it cannot, or when the file is shorter than it should be."""

    def __init__(self, path: Path):
        self.path = path
        self._file = _open(path, os.O_RDONLY)

    def read(self, start: int, nbytes: int) -> torch.Tensor:
        """Bytes `start` to `start` + `nbytes`, uint8."""
        lead = start % BLOCK
        buffer = _aligned(whole_blocks(lead + nbytes))
        view, done = memoryview(buffer.numpy()), 0
        while done < lead + nbytes:
            count = _transfer(_read_into, self._file, view[done:], start - lead + done)
            if not count:
                raise OSError("it has become shorter")
            done += count
        return buffer[lead : lead + nbytes]

    def close(self) -> None:
        """Ends the reading."""
        os.close(self._file)


class DirectWriter:
    """Writes a new file from byte `start` (a multiple of BLOCK) on, in another thread, and what is before it last.

    OSError, from any call, when the disk is full or fails.
    """

    def __init__(self, path: Path, start: int):
        assert start % BLOCK == 0
        self._file = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._head = self._place = start
        self._filled = 0
        self._buffer, self._spare = _aligned(_BUFFER), _aligned(_BUFFER)
        self._thread = ThreadPoolExecutor(1)
        self._last: Future | None = None

    def write(self, data: memoryview) -> None:
        """Appends."""
        while len(data):
            count = min(len(data), _BUFFER - self._filled)
            memoryview(self._buffer.numpy())[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == _BUFFER:
                self._send(_BUFFER)

    def finish(self, head: bytes) -> None:
        """Writes the file's first `start` bytes, and waits until all of it is on the disk."""
        assert len(head) == self._head
        end = self._place + self._filled
        if self._filled:
            self._send(whole_blocks(self._filled))
        self._wait()
        block = _aligned(len(head))
        memoryview(block.numpy())[:] = head
        self._put(block, 0)
        os.ftruncate(self._file, end)
        os.fsync(self._file)

    def close(self) -> None:
        """Gives up what has not been written yet."""
        with contextlib.suppress(OSError):
            self._wait()
        self._thread.shutdown()
        os.close(self._file)

    def _send(self, nbytes: int) -> None:
        self._wait()
        self._last = self._thread.submit(self._put, self._buffer[:nbytes], self._place)
        self._place += nbytes
        self._buffer, self._spare, self._filled = self._spare, self._buffer, 0

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _put(self, buffer: torch.Tensor, place: int) -> None:
        view = memoryview(buffer.numpy())
        while len(view):
            count = _transfer(os.pwrite, self._file, view, place)
            view, place = view[count:], place + count
