"""Records of data with their places, and counts of those that cannot be used."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from utils.errors import Say

FLAG = "--data_path"
MAX_PLACES = 5  # places named per reason
Item = TypeVar("Item")


class BadRecord(ValueError):
    """Raised for a record that cannot be used; loaders count it and continue. The message is the reason."""


@dataclass(frozen=True)
class Record:
    """One parsed record and its place: "file.jsonl:12", "file.json:record 12" or "name[split]:12"."""

    value: Any
    source: str


class Tally:
    """Counts records that were dropped or changed while loading, with the first places per reason."""

    def __init__(self, what: str):
        self.what = what
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, source: str) -> None:
        """Counts one record at `source` under `reason`."""
        places = self._places[reason]
        self._counts[reason] += 1
        if len(places) <= MAX_PLACES and source not in places:  # ranked answers can count one record several times
            places.append(source)

    def counts(self) -> list[tuple[str, int, list[str]]]:
        """Returns (reason, number, first places) per reason, for `add_counts`."""
        return [(reason, number, self._places[reason]) for reason, number in self._counts.items()]

    def add_counts(self, counts: list[tuple[str, int, list[str]]]) -> None:
        """Adds the counts of records that come after those that were counted so far."""
        for reason, number, places in counts:
            known = self._places[reason]
            known += [place for place in places if place not in known][: MAX_PLACES + 1 - len(known)]
            self._counts[reason] += number

    def lines(self) -> list[str]:
        """Returns one line per reason: "prompts: 9 dropped: an empty turn; first at x.jsonl:7, then :8, :12, …"."""
        return [f"{self.what}: {n} {reason}; first at {self._where(reason)}" for reason, n in self._counts.items()]

    def report(self, say: Say) -> None:
        """Prints `lines` with `say`."""
        for line in self.lines():
            say(line)

    def _where(self, reason: str) -> str:
        split = [place.rpartition(":") for place in self._places[reason]]
        then = [f":{line}" if file == before else f"{file}:{line}" for (before, *_), (file, _, line) in pairwise(split)]
        if len(then) == MAX_PLACES:
            then[-1] = "…"
        return self._places[reason][0] + (", then " + ", ".join(then) if then else "")


def note(tally: Tally, source: str, reason: str) -> None:
    """Counts one record in `tally`; with its first two arguments bound, a function that takes a reason."""
    tally.add(reason, source)
