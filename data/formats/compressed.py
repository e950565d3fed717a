"""A stream of the content of a data file, which may be compressed."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.data_files import COMPRESSED
from utils.errors import UserError
from utils.files import open_regular

_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


@contextlib.contextmanager
def reading(file: str | Path, flag: str) -> Iterator[BinaryIO]:
    """Yields a stream of the file's content, decompressed. Raises UserError if it cannot be read or is damaged."""
    try:
        with open_regular(file) as raw, _decompressed(raw, Path(file).suffix.lower()) as stream:
            yield stream
    except _DAMAGE as error:
        reason = "its end is missing" if isinstance(error, EOFError) else str(error)
        raise UserError(f"{flag}: {file} is no whole {Path(file).suffix} file ({reason}); copy it again") from error
    except OSError as error:
        if Path(file).suffix.lower() in COMPRESSED and error.errno is None:  # of a decompressor
            raise UserError(f"{flag}: {file} is no whole {Path(file).suffix} file ({error}); copy it again") from error
        reason = error.strerror or error
        raise UserError(f"{flag}: cannot read {file}: {reason}; use a file that can be read") from error


def _decompressed(raw: BinaryIO, ending: str) -> BinaryIO:
    if ending == ".gz":
        return gzip.open(raw)
    if ending == ".bz2":
        return bz2.open(raw)
    if ending == ".xz":
        return lzma.open(raw)
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw
