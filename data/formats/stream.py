"""Records one after the other, out of a file or a pipe of any length, without holding them all."""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from data.formats.dialogue_forms import check_turns, is_hh, turns_of
from data.formats.json_lines import parse_line
from data.formats.records import BadRecord, Record, read_file
from data.template import Turns
from utils.errors import UserError

PIPE = "-"
DIALOGUE_KEYS = {"messages", "conversations", "instruction", "prompt"}
Form = Literal["auto", "json", "text"]


def stream_records(path: str, flag: str, form: Form = "auto") -> Iterator[Record]:
    """The records of the file at `path`, or of standard input for "-", in order; blank lines are skipped.

    form: json (a value a line), text (a text a line), auto: text for a .txt and for a pipe whose first line does not
    begin like a JSON list, object or text. A .json list, .parquet and .csv are read whole. Raises UserError, naming
    `flag`, for what is not there, and file:line, once it is reached, for what is not readable.
    """
    if path == PIPE:
        return _parse(sys.stdin.buffer, "stdin", form)
    file = Path(path)
    if not os.path.isfile(file):
        raise UserError(f"{flag}: {path} does not exist or is no file; give a .jsonl or .txt file, or - for a pipe")
    suffix = file.suffix.lower()
    if form == "auto" and suffix not in (".jsonl", ".txt"):
        return iter(read_file(file, flag))
    return _from_file(file, flag, "text" if form == "auto" and suffix == ".txt" else form)


def _from_file(file: Path, flag: str, form: Form) -> Iterator[Record]:
    try:
        with file.open("rb") as lines:
            yield from _parse(lines, str(file), form)
    except OSError as error:
        raise UserError(f"{flag}: cannot read {file}: {error.strerror}; give a file that can be read") from error


def _parse(lines: IO[bytes], name: str, form: Form) -> Iterator[Record]:
    texts = ((_decode(line, name, number), number) for number, line in enumerate(lines, start=1))
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
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}:{number}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error


def text_or_answered(value: Any) -> Turns | str:
    """Returns the record's dialogue, which ends in the assistant's answer (it may be empty), or its text.

    Dialogues have any form of dialogue_forms.py; texts are strings or {"text"}. Raises BadRecord, saying why.
    """
    if isinstance(value, dict) and isinstance(value.get("text"), str) and not value.keys() & DIALOGUE_KEYS:
        value = value["text"]
    if isinstance(value, str):
        if not is_hh(value):
            return check_turns([{"role": "user", "content": value}])[0]["content"]
        value = {"prompt": value}
    turns = turns_of(value, empty_answer=True)
    if turns[-1]["role"] != "assistant":
        raise BadRecord("it does not end in an answer of the assistant")
    return turns
