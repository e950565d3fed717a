"""Read tables row by row: .csv and .tsv with the line of each record, .parquet and .arrow in batches."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data.formats.json_lines import decode_line, lines_of
from utils.errors import UserError
from utils.files import MAX_JSON

_ROWS = 1000  # that are read at once


def rows_of_text(stream: BinaryIO, name: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line on which it begins, record) of a .csv or .tsv file with a header. Raises UserError with the line.

    Cells are text; an empty one is None, and one that is a JSON list or object becomes this.
    """
    csv.field_size_limit(min(MAX_JSON, sys.maxsize))
    lines = (decode_line(line, name, number) for number, line in lines_of(stream, name, blank=True))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(rows, None)
        if header and (twice := next((column for column in header if header.count(column) > 1), None)) is not None:
            raise UserError(f"{name}:1: two columns are called {twice!r}; rename one")
        while header is not None:
            line = rows.line_num + 1
            row = next(rows, None)
            if row is None:
                return
            if len(row) > len(header):
                raise UserError(f"{name}:{line}: {len(row)} cells in a table of {len(header)} columns; fix the file")
            if row:
                cells = [*row, *[""] * (len(header) - len(row))]
                yield line, {column: _cell(cell) for column, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise UserError(f"{name}:{line}: not a table ({error}); fix the file") from error


def rows_of_arrow(file: Path, stream: BinaryIO, suffix: str, flag: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row from 1, record) of a .parquet file, or of an .arrow file in either of Arrow's formats."""
    import pyarrow

    number = 0
    try:
        for batch in _batches(file, stream, suffix):
            for rows in (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS)):
                for row in rows.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{flag}: cannot load {file} ({reason}); copy it again, or use another format") from error


def _batches(file: Path, stream: BinaryIO, suffix: str) -> Iterator[Any]:
    import pyarrow

    if not stream.seekable() or Path(file).suffix.lower() != suffix:  # compressed as a whole: the formats need to seek
        stream = pyarrow.BufferReader(stream.read())
    if suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        yield from ParquetFile(stream).iter_batches(_ROWS)
        return
    try:
        reader = pyarrow.ipc.open_file(stream)
    except pyarrow.ArrowInvalid:  # the format of a stream, which `datasets` writes
        stream.seek(0)
        yield from pyarrow.ipc.open_stream(stream)
        return
    yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _cell(text: str) -> Any:
    """Returns the value of a cell."""
    if text[:1] in "[{" and text:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text or None
