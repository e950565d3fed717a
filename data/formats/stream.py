"""Read records from a file or a pipe one by one, without holding all of them in memory."""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from data.formats.dialogue_forms import parse_turns
from data.formats.json_lines import parse_line
from data.formats.records import BadRecord, Record, read_file
from data.formats.turns import check_turns, is_hh
from data.template import Turns
from utils.errors import UserError
from utils.files import MAX_JSON, open_regular

PIPE = "-"
DIALOGUE_KEYS = {"messages", "conversations", "instruction", "prompt"}
Form = Literal["auto", "json", "text"]


def stream_records(path: str, flag: str, form: Form = "auto") -> Iterator[Record]:
    """Yields the records of a file, or of standard input for "-", in order; blank lines are skipped.

    form: json or text (one per line), or auto: text for .txt and for a pipe whose first line does not begin like JSON.
    .json, .parquet and .csv are read whole. Raises UserError, for a broken line when it is reached.
    """
    if path == PIPE:
        return _parse(sys.stdin.buffer, "stdin", form)
    file = Path(path)
    if not os.path.isfile(file):
        raise UserError(f"{flag}: {path} does not exist or is not a file; use a .jsonl or .txt file, or - for a pipe")
    suffix = file.suffix.lower()
    if form == "auto" and suffix not in (".jsonl", ".txt"):
        return iter(read_file(file, flag))
    return _from_file(file, flag, "text" if form == "auto" and suffix == ".txt" else form)


def _from_file(file: Path, flag: str, form: Form) -> Iterator[Record]:
    try:
        with open_regular(file) as lines:
            yield from _parse(lines, str(file), form)
    except OSError as error:
        raise UserError(f"{flag}: cannot read {file}: {error.strerror}; use a file that can be read") from error


def _parse(lines: IO[bytes], name: str, form: Form) -> Iterator[Record]:
    pieces = iter(lambda: lines.readline(MAX_JSON + 1), b"")
    texts = ((_decode(line, name, number), number) for number, line in enumerate(pieces, start=1))
    texts = ((text, number) for text, number in texts if text.strip())
    first = next(texts, None)
    if first is None:
        return
    if form == "auto" and name == "stdin" and first[0].lstrip()[0] not in '[{"':
        form = "text"
    for text, number in itertools.chain([first], texts):
        value = text.strip() if form == "text" else parse_line(text, name, number)
        yield Record(value, f"{name}:{number}")


def _decode(line: bytes, name: str, number: int) -> str:
    if len(line) > MAX_JSON:
        raise UserError(f"{name}:{number}: the line has more than {MAX_JSON >> 20} MB; write one record per line")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}:{number}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error


def dialogue_or_text(value: Any) -> Turns | str:
    """Returns the dialogue of a record, which ends in an answer (possibly empty), or its text. Raises BadRecord."""
    if isinstance(value, dict) and isinstance(value.get("text"), str) and not value.keys() & DIALOGUE_KEYS:
        value = value["text"]
    if isinstance(value, str):
        if not is_hh(value):
            return check_turns([{"role": "user", "content": value}])[0]["content"]
        value = {"prompt": value}
    turns = parse_turns(value, empty_answer=True)
    if turns[-1]["role"] != "assistant":
        raise BadRecord("it does not end in an answer of the assistant")
    return turns
