"""JSON files to (value, line) pairs, so that every record of a data file can be pointed at."""

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError

Located = list[tuple[Any, int]]


def parse_json_lines(file: Path, flag: str) -> Located:
    """(value, line) of a file with one JSON value a line; blank lines are skipped. UserError: file:line or `flag`."""
    located: Located = []
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for line, text in enumerate(_read(file, flag).split("\n"), start=1):
        if text.strip():
            located.append((parse_line(text, file, line), line))
    return located


def parse_line(text: str, file: Path | str, line: int) -> Any:
    """The one JSON value of a line. UserError names file:line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(file, line, error) from error


def parse_json_list(file: Path, flag: str) -> Located:
    """(item, line on which it begins) of a file that is one JSON list. UserError names file:line, or `flag`."""
    text = _read(file, flag)
    position = _skip_space(text, 0)
    line = 1 + text.count("\n", 0, position)
    if position == len(text):
        return []
    if text[position] != "[":
        raise UserError(f"{file}:{line}: expected a list of records; with one JSON value a line, name the file .jsonl")
    located: Located = []
    decoder = json.JSONDecoder()
    separator = "["
    while separator != "]":
        start = _skip_space(text, position + 1)
        line += text.count("\n", position, start)
        if separator == "[" and text[start : start + 1] == "]":
            position = start
            break
        try:
            value, stop = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _broken(file, error.lineno, error) from error
        except (ValueError, RecursionError) as error:
            raise _broken(file, line, error) from error
        located.append((value, line))
        position = _skip_space(text, stop)
        line += text.count("\n", start, position)
        separator = text[position : position + 1]
        if separator not in ("]", ","):
            raise UserError(f"{file}:{line}: broken JSON (expected ',' or ']' after a record); mend the file")
    if _skip_space(text, position + 1) < len(text):
        raise UserError(f"{file}:{line}: broken JSON (something follows the end of the list); mend the file")
    return located


def json_line(value: Any) -> str:
    """A value as a line of JSON, for every value that our loaders give.

    What JSON has no form for, such as a date out of a .parquet file, becomes text; half a surrogate pair, which no file
    can hold, its escape.
    """
    line = json.dumps(value, ensure_ascii=False, default=str)
    return (json.dumps(value, default=str) if has_half_pair(line) else line) + "\n"


def has_half_pair(text: str) -> bool:
    """Whether half of a surrogate pair stands in it: JSON can bring that, no file and no tokenizer takes it."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _read(file: Path, flag: str) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{flag}: cannot read {file}: {error.strerror}; give a file that can be read") from error


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _broken(file: Path | str, line: int, error: Exception) -> UserError:
    reason = getattr(error, "msg", None) or str(error).split(";")[0]
    return UserError(f"{file}:{line}: broken JSON ({reason}); mend the file")
