"""Text from data, files and models is safe to show: control characters are escaped wherever the process prints."""

import contextlib
import errno
import io
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import TextIO

# C0 but for tab and line feed; DEL and C1; line separators and bidirectional overrides; lone surrogates
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_BAR = re.compile(r"(\x1b\[A)+\Z|\r?")  # what tqdm writes before a bar: cursor up, or a return to the line's start
_SURROGATES = re.compile(r"[\ud800-\udfff]")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of libraries' messages
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # the reader of the pipe, or the terminal


def printable(text: str) -> str:
    r"""Returns the text with each control character as \uXXXX, which JSON strings read back; \t and \n stay."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def columns_of(text: str) -> int:
    """Returns the number of columns of a terminal that a text without control characters takes."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char) for char in text)


def has_lone_surrogate(text: str) -> bool:
    """Returns whether the text contains half of a surrogate pair. JSON allows that; files and tokenizers do not."""
    return not text.isascii() and _SURROGATES.search(text) is not None  # millions of texts are asked


class SafeStream:
    r"""A text stream that writes `printable` text to `raw`, and is quiet once the pipe or terminal of `raw` is gone.

    bars: let pass what tqdm begins a write with ("\r", or nothing but cursor movements). Other attributes are `raw`'s.
    """

    _after_bar = False  # whether a bar is the last that was written, so that other text needs a line of its own

    def __init__(self, raw: TextIO, bars: bool = False):
        self.raw, self._bars = raw, bars

    def __getattr__(self, name: str):
        if name == "raw":  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.raw, name)

    def write(self, text: str) -> int:
        """Writes the text, escaped and without colours. Returns its length."""
        start = _BAR.match(text).end() if self._bars else 0
        shown = text[:start] + printable(_COLOURS.sub("", text[start:]))
        if text.strip():  # tqdm clears its bar with blanks
            if SafeStream._after_bar and not start:
                shown = f"\n{shown}"
            SafeStream._after_bar = start > 0
        elif "\r" in text or "\n" in text:
            SafeStream._after_bar = False
        self._until_gone(self.raw.write, shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each text, escaped."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As that of `raw`."""
        self._until_gone(self.raw.flush)

    def _until_gone(self, function: Callable, *arguments) -> None:
        try:
            function(*arguments)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            with contextlib.suppress(OSError):  # what is still in a buffer, too, goes nowhere, without an error at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.raw.fileno())


def protect_streams() -> None:
    """Makes stdout and stderr of this process SafeStreams. Lines of stdout reach a pipe at once."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream and not isinstance(stream, SafeStream):  # None if the process began without it
            setattr(sys, name, SafeStream(stream, bars=name == "stderr"))
