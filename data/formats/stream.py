"""Read records from a file or a pipe one by one, without holding all of them in memory."""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from data.formats.compressed import reading
from data.formats.dialogue_forms import parse_turns
from data.formats.json_lines import lines_of
from data.formats.records import BadRecord, Record
from data.formats.turns import check_turns, is_hh
from data.sources import Part, Raw, check_ending, parse_raw
from data.template import Turns
from utils.errors import UserError

PIPE = "-"
DIALOGUE_KEYS = {"messages", "conversations", "instruction", "prompt"}
Form = Literal["auto", "json", "text"]


def stream_records(path: str, flag: str, form: Form = "auto") -> Iterator[Record]:
    """Yields the records of a file, or of standard input for "-", in order; blank lines are skipped.

    form: json or text (one per line), or auto: text for .txt and for a pipe whose first line does not begin like JSON.
    Raises UserError, for a broken line when it is reached.
    """
    if path == PIPE:
        return _parse(sys.stdin.buffer, "stdin", form)
    file = Path(path)
    if not os.path.isfile(file):
        raise UserError(f"{flag}: {path} does not exist or is not a file; use a .jsonl or .txt file, or - for a pipe")
    if form == "auto":
        check_ending(path, flag)
        return Part(path, flag).records()
    return _from_file(file, flag, form)


def _from_file(file: Path, flag: str, form: Form) -> Iterator[Record]:
    with reading(file, flag) as lines:
        yield from _parse(lines, str(file), form)


def _parse(lines: BinaryIO, name: str, form: Form) -> Iterator[Record]:
    numbered = lines_of(lines, name)
    first = next(numbered, None)
    if first is None:
        return
    if form == "auto" and name == "stdin" and first[1].lstrip()[:1] not in (b"[", b"{", b'"'):
        form = "text"
    for number, line in itertools.chain([first], numbered):
        yield parse_raw(Raw(f"{name}:{number}", line, form == "text"))


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
