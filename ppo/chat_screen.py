"""Shows answers while they grow: in a terminal with notes and in two columns, in a pipe as plain text."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from itertools import zip_longest
from typing import IO

from utils.terminal import columns_of, printable

MIN_COLUMNS = 80  # of a terminal that has room for two answers side by side
_BOLD, _DIM = "1", "2"


class Screen:
    """Writes to `out`. is_terminal: with notes, and with colours if the user has not switched them off."""

    def __init__(self, out: IO[str], is_terminal: bool):
        self.out, self.is_terminal = out, is_terminal
        self.has_colours = is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    @property
    def has_columns(self) -> bool:
        """Whether two answers stand side by side."""
        return self.is_terminal and _width() >= MIN_COLUMNS

    def note(self, text: str) -> None:
        """Shows a line beside the dialogue: in a pipe on standard error."""
        if self.is_terminal:
            self._write(self._styled(text, _DIM) + "\n")
        else:
            print(text, file=sys.stderr, flush=True)

    def line(self, text: str, bold: bool = False) -> None:
        """Writes a line."""
        self._write(self._styled(text, _BOLD if bold else "") + "\n")

    def one(self, texts: Iterator[str]) -> None:
        """Shows an answer: texts, each of which begins with the one before."""
        shown = ""
        for text in texts:
            fits = text.startswith(shown)  # few tokenizers change what came before
            self._write(printable(text[len(shown) :] if fits else f"\n{text}"))
            shown = text

    def two(self, labels: list[str], texts: list[Iterator[str]]) -> None:
        """Shows two answers side by side. The newest row is written anew after each token; rows above stay."""
        half = _half()
        self.line(_row([shortened(label, half) for label in labels], half), bold=True)
        row, found = 0, ["", ""]
        for grown in zip_longest(*texts):
            ended = [text is None for text in grown]
            found = [old if text is None else text for old, text in zip(found, grown, strict=True)]
            row = self._rows(found, ended, row, half)
        self._rows(found, [True, True], row, half)

    def rows(self, texts: list[str]) -> None:
        """Writes a remark on each of the answers above, in a terminal with an empty line below."""
        width = _half() if len(texts) > 1 else _width()
        cells = [wrapped(text, width) if self.is_terminal else [text] for text in texts]
        for cell in zip_longest(*cells, fillvalue=""):
            if any(cell):
                self._write(self._styled(_row(list(cell), _half()) if len(cell) > 1 else cell[0], _DIM) + "\n")
        if self.is_terminal:
            self.line("")

    def _rows(self, texts: list[str], ended: list[bool], row: int, half: int) -> int:
        """Writes from `row` on what is known. Returns the row that can still change."""
        sides = [wrapped(printable(text), half) for text in texts]
        while row < max(map(len, sides)):
            self._write("\r" + _row([(side[row : row + 1] or [""])[0] for side in sides], half))
            if any(len(side) <= row + 1 and not over for side, over in zip(sides, ended, strict=True)):
                break
            self._write("\n")
            row += 1
        return row

    def _styled(self, text: str, style: str) -> str:
        text = printable(text)
        return f"\x1b[{style}m{text}\x1b[0m" if self.has_colours and style else text

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def _half() -> int:
    return (_width() - 4) // 2  # the last column stays free: some terminals break the line there


def _width() -> int:
    return shutil.get_terminal_size((MIN_COLUMNS, 24)).columns


def _row(cells: list[str], half: int) -> str:
    left, right = (cell + " " * (half - columns_of(cell)) for cell in cells)
    return f"{left} │ {right}"


def shortened(text: str, width: int) -> str:
    """Returns the end of a text that has at most `width` columns, with … before it if it is not the whole."""
    start = 0
    while columns_of(text[start:]) + (start > 0) > width:
        start += 1
    return "…" * (start > 0) + text[start:]


def wrapped(text: str, width: int) -> list[str]:
    """Returns lines of at most `width` columns, broken at spaces and wide characters. More text changes the last."""
    lines = []
    for paragraph in text.expandtabs(4).split("\n"):
        line, used = "", 0
        for char in paragraph:
            size = columns_of(char)
            if used + size > width:
                head, tail = line, ""
                if char != " " and size == 1 and (found := re.fullmatch(r"(.*\S) +(\S*)", line)):
                    head, tail = found.groups()
                lines.append(head)
                line, used = tail, columns_of(tail)
                if char == " ":
                    continue
            line, used = line + char, used + size
        lines.append(line)
    return lines
