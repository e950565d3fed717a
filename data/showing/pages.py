"""A report as text for a terminal and as an HTML page: headings, lines, tables, bars and records."""

import html
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from data.showing.pieces import Piece, common_start
from utils.html import html_page, html_table
from utils.terminal import printable

LEGEND = "learnt: green or in ⟦ ⟧; special tokens: reversed, bold or in ‹ ›; the rest is masked"
_SHADES = {True: (28, 34), False: (241, 247)}  # learnt or not; a token ends where the shade changes
_BAR = 40  # characters of the longest one
_STYLE = """.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20em, 100%), 1fr)); gap: 1em; }
.learnt { background: #2a83; } .special { color: light-dark(#828, #e9e); font-weight: bold; }
th { overflow-wrap: normal; }
.token { border-right: 1px solid #8886; } .bar { background: #48c; height: 1em; }
pre { border: 1px solid #8888; padding: 0.5em; margin: 0.3em 0; max-height: 40em; overflow: auto; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading of a section."""

    text: str


@dataclass(frozen=True)
class Lines:
    """Lines of text."""

    lines: list[str]


@dataclass(frozen=True)
class Table:
    """A table."""

    header: list[str]
    rows: list[list]


@dataclass(frozen=True)
class Bars:
    """Numbers of records by label."""

    sizes: list[tuple[str, int]]


@dataclass(frozen=True)
class View:
    """A record: its title, what is known about it, and its text once per answer, with a label for each."""

    title: str
    lines: list[str]
    sides: list[tuple[str, list[Piece]]]


Block = Heading | Lines | Table | Bars | View


def to_text(blocks: list[Block], width: int, colour: bool) -> str:
    """Returns the report as text. Without colours, brackets mark what is learnt and special tokens."""
    return "\n".join(line for block in blocks for line in _text_lines(block, width, colour)) + "\n"


def _text_lines(block: Block, width: int, colour: bool) -> Iterator[str]:
    match block:
        case Heading(text):
            yield from ("", printable(text), "─" * min(width, len(text)))
        case Lines(lines):
            yield from map(printable, lines)
        case Table(header, rows):
            cells = [[printable(str(cell)) for cell in row] for row in [header, *rows]]
            widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
            yield from ("  ".join(_padded(c, w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
        case Bars(sizes):
            label, total = max(len(name) for name, _ in sizes), sum(size for _, size in sizes)
            most = max(size for _, size in sizes)
            for name, size in sizes:
                yield f"{name:>{label}}  {'█' * round(_BAR * size / most):{_BAR}}  {size} ({size / total:.1%})"
        case View(title, lines, sides):
            yield from ("", printable(title), *(f"  {printable(line)}" for line in lines))
            yield from _sides(sides, width, colour)


def _sides(sides: list[tuple[str, list[Piece]]], width: int, colour: bool) -> Iterator[str]:
    """Yields what all sides begin with, then the rest of each, two side by side where the width allows it."""
    start = common_start([pieces for _, pieces in sides]) if len(sides) > 1 else 0
    if start:
        yield from _coloured(sides[0][1][:start], colour, width)
    rest = [[label, *_coloured(pieces[start:], colour, (width - 3) // 2)] for label, pieces in sides]
    if len(rest) != 2 or width < 80:
        for label, pieces in sides:
            yield from ([label] * bool(label) + list(_coloured(pieces[start:], colour, width)))
        return
    half = (width - 3) // 2
    for k in range(max(map(len, rest))):
        left, right = (lines[k] if k < len(lines) else "" for lines in rest)
        yield f"{_padded(left, half)} │ {right}".rstrip()


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
        run = ""
        for char in text:
            size = _width(char)
            if char == "\n" or column + size > width:
                lines[-1] += f"{start}{run}{stop}" * bool(run)
                lines.append("")
                run, column = "", 0
            if char != "\n":
                run, column = run + char, column + size
        lines[-1] += f"{start}{run}{stop}" * bool(run)
    return lines


def _width(text: str) -> int:
    """Returns the number of columns of a terminal that the text takes, without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char) for char in plain)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def to_html(title: str, blocks: list[Block]) -> str:
    """Returns the report as a page; all texts are escaped."""
    return printable(html_page(title, "\n".join(map(_html, blocks)), _STYLE))


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Lines(lines):
            return "".join(f"<p>{html.escape(line)}</p>" for line in lines)
        case Table(header, rows):
            return html_table(header, rows)
        case Bars(sizes):
            most, total = max(size for _, size in sizes), sum(size for _, size in sizes)
            bar = '<div class="bar" style="width: {:.1f}em"></div>'
            rows = (
                f"<tr><td>{name}</td><td>{bar.format(16 * size / most)}</td><td>{size} ({size / total:.1%})</td></tr>"
                for name, size in sizes
            )
            return f"<table>{''.join(rows)}</table>"
        case View(title, lines, sides):
            known = "".join(f"<br>{html.escape(line)}" for line in lines)
            texts = "".join(f"<div><b>{html.escape(label)}</b><pre>{_spans(x)}</pre></div>" for label, x in sides)
            return f'<h3>{html.escape(title)}</h3><p>{known.removeprefix("<br>")}</p><div class="sides">{texts}</div>'


def _spans(pieces: list[Piece]) -> str:
    """Returns the pieces as HTML; a token's id is its title."""
    span = '<span class="token{}{}" title="{}">{}</span>'
    return "".join(
        span.format(" learnt" * p.is_learnt, " special" * p.is_special, ", ".join(map(str, p.ids)), html.escape(p.text))
        for p in pieces
    )
