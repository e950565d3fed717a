"""Read JSON data files record by record, so that messages can name the line or the number of a record."""

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_bytes
from utils.terminal import printable

Located = list[tuple[Any, str]]  # (record, its position in the file: a line number, or "record N")


def parse_json_lines(file: Path, flag: str) -> Located:
    """Returns the JSON value and the number of each line that is not blank. Raises UserError for broken JSON."""
    # Not splitlines(): JSON strings may contain U+2028 and similar characters.
    lines = enumerate(_read(file, flag).split("\n"), start=1)
    return [(parse_line(text, file, number), str(number)) for number, text in lines if text.strip()]


def parse_line(text: str, file: Path | str, line: int) -> Any:
    """Returns the JSON value of one line. Raises UserError with file and line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(f"{file}:{line}", error) from error


def parse_json_list(file: Path, flag: str) -> Located:
    """Returns the items of a file with one JSON list, numbered from 1; [] if blank. UserError if it is broken."""
    text = _read(file, flag)
    if not text.strip():
        return []
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(f"{file}:{getattr(error, 'lineno', 1)}", error) from error
    if not isinstance(values, list):
        raise UserError(f"{file}: the file is not a JSON list of records; use the ending .jsonl for one value per line")
    return [(value, f"record {number}") for number, value in enumerate(values, start=1)]


def json_line(value: Any) -> str:
    """Returns the value as one line of JSON. Control characters are escaped; dates and other values become text."""
    return printable(json.dumps(value, ensure_ascii=False, default=str)) + "\n"


def _read(file: Path, flag: str) -> str:
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag}: cannot read {file}: {reason}; use a file that can be read") from error


def _broken(place: str, error: Exception) -> UserError:
    reason = getattr(error, "msg", None) or str(error).split(";")[0]
    column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    return UserError(f"{place}: broken JSON ({reason}{column}); fix the file")
