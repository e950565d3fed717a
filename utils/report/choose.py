"""What is shown of long runs: points of a line, rows of samples. Pure."""

import math
from itertools import groupby
from operator import itemgetter
from typing import Any

MAX_POINTS = 500  # per line


def is_number(value: Any) -> bool:
    """Returns whether a value can be drawn; a line that looks like a run's may have any value."""
    return type(value) in (int, float) and abs(value) < 1e300


def short_names(paths: list[str]) -> list[str]:
    """Returns the last parts of paths, as few as tell them apart; the whole paths if more than 4 would be needed."""
    parts = [[part for part in path.split("/") if part] or [path] for path in paths]
    for count in range(1, 5):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return paths


def points(metrics: list[dict], key: str, x: str = "step") -> list[tuple[float, float]]:
    """Returns (x, value) of the rows that have numbers for both."""
    found = [(row.get(x), row[key]) for row in metrics if is_number(row.get(key))]
    return found if x == "step" else [pair for pair in found if is_number(pair[0])]


def thinned(line: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Returns at most `limit` points: first, last, and the lowest and highest of each of equally large bins."""
    if len(line) <= limit:
        return line
    inner, bins = line[1:-1], (limit - 2) // 2
    kept = [line[0]]
    for k in range(bins):
        part = inner[k * len(inner) // bins : (k + 1) * len(inner) // bins]
        places = {part.index(f(part, key=itemgetter(1))) for f in (min, max)}
        kept += [part[i] for i in sorted(places)]
    return [*kept, line[-1]]


def evenly(items: list, count: int) -> list:
    """Returns `count` of the items, evenly spread, the first and the last among them; all if there are fewer."""
    if len(items) <= count:
        return items
    if count < 2:
        return items[-count:] if count else []
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def choose_rows(rows: list[tuple[int, bool]], limit: int) -> list[int]:
    """Returns the places of at most `limit` rows, (step, held out), in order: whole steps, spread evenly over the run.

    Held-out rows get half of the places, or what the others leave. Of a step that is too large the first rows are kept.
    """
    places = {kind: [i for i, row in enumerate(rows) if row[1] == kind] for kind in (True, False)}
    held = min(len(places[True]), max(limit // 2, limit - len(places[False])))
    return sorted(_of_steps(rows, places[True], held) + _of_steps(rows, places[False], limit - held))


def _of_steps(rows: list[tuple[int, bool]], places: list[int], limit: int) -> list[int]:
    steps = [list(group) for _, group in groupby(sorted(places, key=lambda i: rows[i][0]), lambda i: rows[i][0])]
    if len(places) <= limit or not steps:
        return places
    most = max(map(len, steps))
    kept = evenly(steps, max(min(2, limit), limit // most))
    share = math.ceil(limit / max(1, len(kept)))
    return [i for step in kept for i in step[:share]][:limit]
