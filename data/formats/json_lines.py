"""Read JSON data files record by record without holding them, so that messages can name the line or the record."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from utils.errors import UserError
from utils.files import MAX_JSON
from utils.terminal import printable

_SPACE = re.compile(r"[ \t\n\r]*")
_CHUNK = 1 << 20  # bytes that are read at once of a JSON list


def lines_of(stream: BinaryIO, name: str, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, bytes) of each line; blank: of blank ones too. UserError for one of more than 64 MB."""
    for number, line in enumerate(iter(lambda: stream.readline(MAX_JSON + 1), b""), start=1):
        if len(line) > MAX_JSON:
            raise UserError(f"{name}:{number}: the line has more than {MAX_JSON >> 20} MB; write one record per line")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if blank or line.strip():
            yield number, line


def decode_line(line: bytes, name: str, number: int) -> str:
    """Returns the text of one line. Raises UserError with file and line unless it is UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}:{number}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error


def parse_line(text: str, name: str, number: int) -> Any:
    """Returns the JSON value of one line. Raises UserError with file and line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error).split(";")[0]
        column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise _broken(f"{name}:{number}", reason + column) from error


def items_of(stream: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """Yields (number from 1, value) of each item of a JSON list; nothing if the file is blank. UserError if broken.

    Items are parsed from a buffer that grows until it holds a whole one.
    """
    buffer, decoder, number = _Buffer(stream, name), json.JSONDecoder(), 0
    if not (sign := buffer.peek()):
        return
    if sign != "[":
        raise UserError(f"{name}: the file is not a JSON list of records; use the ending .jsonl for one value per line")
    buffer.place += 1
    while buffer.peek() != "]" or number:
        number += 1
        yield number, buffer.value(decoder)
        if (sign := buffer.peek()) == "]":
            break
        if sign != ",":
            raise buffer.broken("Expecting ',' delimiter", buffer.place)
        buffer.place += 1
        buffer.peek()
    buffer.place += 1
    if buffer.peek():
        raise buffer.broken("Extra data", buffer.place)


def json_line(value: Any) -> str:
    """Returns the value as one line of JSON. Control characters are escaped; dates and other values become text."""
    return printable(json.dumps(value, ensure_ascii=False, default=str)) + "\n"


class _Buffer:
    """The text of a stream from a place on; what lies before it is dropped when more is read."""

    def __init__(self, stream: BinaryIO, name: str):
        self.text, self.place = "", 0
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes, self._lines, self._column = 0, 0, 0  # read so far; of the text that was dropped

    def more(self, count: int = _CHUNK) -> bool:
        """Reads `count` bytes; returns whether there were any. Moves the place to the start of the text."""
        dropped, self.text, self.place = self.text[: self.place], self.text[self.place :], 0
        lines, line = dropped.count("\n"), dropped.rpartition("\n")[2]
        self._lines, self._column = self._lines + lines, len(line) + (0 if lines else self._column)
        data = self._stream.read(count)
        try:
            self.text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            number = 1 + self._lines + self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            at = self._bytes - (len(error.object) - len(data)) + error.start
            raise UserError(f"{self._name}:{number}: not UTF-8 (byte {at}); save the file as UTF-8") from error
        self._bytes += len(data)
        return bool(data)

    def peek(self) -> str:
        """Skips white space; returns the next character, "" at the end of the file."""
        while True:
            self.place = _SPACE.match(self.text, self.place).end()
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def value(self, decoder: json.JSONDecoder) -> Any:
        """Returns the JSON value at the place, and moves behind it. Raises UserError if it is broken."""
        size, at_end = _CHUNK, False
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.place)
                if end < len(self.text) or at_end:  # else a number could go on
                    self.place = end
                    return value
            except RecursionError as error:
                raise self.broken(str(error), self.place) from error
            except ValueError as error:
                if at_end or len(self.text) - self.place > MAX_JSON:
                    raise self.broken(getattr(error, "msg", str(error)), getattr(error, "pos", self.place)) from error
            at_end = not self.more(size)
            size *= 2

    def broken(self, reason: str, place: int) -> UserError:
        """Returns the error for a place in the text."""
        before = self.text[:place]
        lines, line = before.count("\n"), before.rpartition("\n")[2]
        column = len(line) + 1 + (0 if lines else self._column)
        return _broken(f"{self._name}:{1 + self._lines + lines}", f"{reason.split(';')[0]}, column {column}")


def _broken(place: str, reason: str) -> UserError:
    return UserError(f"{place}: broken JSON ({reason}); fix the file")
