"""A report as text for a terminal and as an HTML page."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from data.showing.pieces import Piece, common_start
from utils.html import html_page, html_table
from utils.terminal import columns_of, printable

LEGEND = "learnt: green or in ⟦ ⟧; special tokens: reversed, bold or in ‹ ›; the rest is masked"
_SHADES = {True: (28, 34), False: (241, 247)}  # learnt or not; a token ends where the shade changes
_STYLE = """.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20em, 100%), 1fr)); gap: 1em; }
.learnt { background: #2a83; } .special { color: light-dark(#828, #e9e); font-weight: bold; }
.token { border-right: 1px solid #8886; } th { overflow-wrap: normal; }
pre { border: 1px solid #8888; padding: 0.5em; margin: 0.3em 0; max-height: 40em; overflow: auto; }
"""


@dataclass(frozen=True)
class Section:
    """A part of a report. table: header and rows; sides: label and text of each answer; level: 3 for a record."""

    title: str
    lines: list[str]
    table: list[list] = field(default_factory=list)
    sides: list[tuple[str, list[Piece]]] = field(default_factory=list)
    level: int = 2


def to_text(sections: list[Section], width: int, colour: bool) -> str:
    """Returns the report as text. Without colours, brackets mark what is learnt and special tokens."""
    return "".join(f"{line}\n" for section in sections for line in _text_lines(section, width, colour))


def _text_lines(section: Section, width: int, colour: bool) -> Iterator[str]:
    yield from ("", printable(section.title))
    yield from ["─" * min(width, len(section.title))] * (section.level == 2)
    yield from ("  " * (section.level == 3) + printable(line) for line in section.lines)
    rows = [[printable(str(cell)) for cell in row] for row in section.table]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(map(_padded, row, widths)).rstrip()
    pieces, half = [text for _, text in section.sides], (width - 3) // 2
    start = common_start(pieces) if len(pieces) > 1 else 0
    if start:
        yield from _coloured(pieces[0][:start], colour, width)
    if len(pieces) != 2 or width < 80:
        for label, text in section.sides:
            yield from [label] * bool(label) + _coloured(text[start:], colour, width)
        return
    left, right = ([label, *_coloured(text[start:], colour, half)] for label, text in section.sides)
    for k in range(max(len(left), len(right))):
        yield f"{_padded(''.join(left[k : k + 1]), half)} │ {''.join(right[k : k + 1])}".rstrip()


def _coloured(pieces: list[Piece], colour: bool, width: int) -> list[str]:
    """Returns lines of at most `width` columns. Each line sets its colours anew."""
    lines, column, before = [""], 0, False
    for k, piece in enumerate(pieces):
        start, text, stop = "", printable(piece.text), ""
        if colour:
            start, stop = f"\x1b[{'7;' * piece.is_special}38;5;{_SHADES[piece.is_learnt][k % 2]}m", "\x1b[0m"
        else:
            after = k + 1 < len(pieces) and pieces[k + 1].is_learnt
            text = f"‹{text}›" if piece.is_special else text
            text = "⟦" * (piece.is_learnt > before) + text + "⟧" * (piece.is_learnt > after)
            before = piece.is_learnt
        lines[-1] += start
        for char in text:
            size = _width(char)
            if char == "\n" or column + size > width:
                lines[-1] += stop
                lines.append(start)
                column = 0
            lines[-1] += char.removeprefix("\n")
            column += size * (char != "\n")
        lines[-1] += stop
    return lines


def _width(text: str) -> int:
    """Returns the number of columns of a terminal that the text takes, without colours."""
    return columns_of(re.sub(r"\x1b\[[0-9;]*m", "", text))


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def to_html(title: str, sections: list[Section]) -> str:
    """Returns the report as a page; all texts are escaped."""
    return printable(html_page(title, "\n".join(map(_html, sections)), _STYLE))


def _html(section: Section) -> str:
    lines = "<br>".join(map(html.escape, section.lines))
    table = html_table(section.table[0], section.table[1:]) if section.table else ""
    sides = (f"<div><b>{html.escape(label)}</b><pre>{_spans(text)}</pre></div>" for label, text in section.sides)
    heading = f"<h{section.level}>{html.escape(section.title)}</h{section.level}>"
    return f'{heading}<p>{lines}</p>{table}<div class="sides">{"".join(sides)}</div>'


def _spans(pieces: list[Piece]) -> str:
    """Returns the pieces as HTML; a token's id is its title."""
    span = '<span class="token{}{}" title="{}">{}</span>'
    return "".join(
        span.format(" learnt" * p.is_learnt, " special" * p.is_special, " ".join(map(str, p.ids)), html.escape(p.text))
        for p in pieces
    )
