"""utils/direct_files.py: bytes in any place and number, on disks that take direct access and where they do not."""

import os
import random

import pytest

from utils import direct_files
from utils.direct_files import BLOCK, DirectReader, DirectWriter
from utils.tensor_stream import as_bytes

CONTENT = random.Random(0).randbytes(5 * BLOCK + 777)


@pytest.fixture(params=["direct", "refused when opened", "refused when used"])
def access(request, monkeypatch):
    """As the file system likes it, or one that takes no direct access."""
    if request.param == "refused when opened":
        monkeypatch.setattr(direct_files, "_DIRECT", 1 << 30)  # a flag that nothing knows
        real = os.open
        monkeypatch.setattr(os, "open", lambda path, flags, mode=0o777: real(_refuse(path, flags), flags, mode))
    if request.param == "refused when used":
        for name in ("preadv", "pwrite"):
            monkeypatch.setattr(os, name, _once_invalid(getattr(os, name)))
    return request.param


def _refuse(path, flags: int):
    if flags & 1 << 30:
        raise OSError(22, "Invalid argument")
    return path


def _once_invalid(function):
    refused = []

    def call(*arguments):
        if not refused:
            refused.append(True)
            raise OSError(22, "Invalid argument")
        return function(*arguments)

    return call


@pytest.mark.parametrize(
    "start, nbytes", [(0, 10), (1, BLOCK), (BLOCK, BLOCK), (BLOCK - 3, 6), (777, len(CONTENT) - 777)]
)
def test_reads_what_is_there(start, nbytes, access, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    reader = DirectReader(tmp_path / "file")
    assert bytes(as_bytes(reader.read(start, nbytes))) == CONTENT[start : start + nbytes]
    reader.close()


def test_a_file_that_ends_too_early_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    reader = DirectReader(tmp_path / "file")
    with pytest.raises(OSError, match="shorter"):
        reader.read(BLOCK, len(CONTENT))
    reader.close()


@pytest.mark.parametrize("sizes", [[], [1], [BLOCK], [3, BLOCK, 5000], [999] * 30], ids=str)
def test_writes_what_it_is_given(sizes, access, tmp_path, monkeypatch):
    monkeypatch.setattr(direct_files, "_BUFFER", 2 * BLOCK)
    pieces = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
    writer = DirectWriter(tmp_path / "file", BLOCK)
    for piece in pieces:
        writer.write(memoryview(piece))
    writer.finish(CONTENT[:BLOCK])
    writer.close()
    assert (tmp_path / "file").read_bytes() == CONTENT[:BLOCK] + b"".join(pieces)
