"""Records of data with their places, and counts of those that cannot be used."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from utils.errors import Say

FLAG = "--data_path"
MAX_PLACES = 5  # places named per reason
SEEN = ": it has the columns "  # begins the part of a reason that differs between records; the first one is shown
UNREAD = "not read: "  # begins the reason for a column that no form reads
MAX_UNREAD = 20  # columns named as not read
Counts = dict[str, list]  # of a tally, as JSON
Parsed = TypeVar("Parsed")


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
        self._details: dict[str, str] = {}
        self._unread: dict[str, None] = {}

    def add(self, reason: str, source: str) -> None:
        """Counts one record at `source` under `reason`, or keeps the column that it names as not read."""
        if reason.startswith(UNREAD):
            if len(self._unread) <= MAX_UNREAD:
                self._unread[reason.removeprefix(UNREAD)] = None
            return
        reason, *detail = reason.partition(SEEN)
        self._details.setdefault(reason, "".join(detail))
        places = self._places[reason]
        self._counts[reason] += 1
        if len(places) <= MAX_PLACES and source not in places:  # ranked answers can count one record several times
            places.append(source)

    def once(self, source: str) -> Callable[[str], None]:
        """Returns a function that counts the record at `source` under a reason, and under the same reason only once."""
        seen = set()

        def note(reason: str) -> None:
            if reason not in seen:
                seen.add(reason)
                self.add(reason, source)

        return note

    def counts(self) -> Counts:
        """Returns what was counted, for `add_counts`."""
        reasons = [[reason, n, self._places[reason], self._details[reason]] for reason, n in self._counts.items()]
        return {"reasons": reasons, "unread": list(self._unread)}

    def add_counts(self, counts: Counts) -> None:
        """Adds the counts of records that come after those that were counted so far."""
        for reason, number, places, detail in counts["reasons"]:
            self._details.setdefault(reason, detail)
            known = self._places[reason]
            known += [place for place in places if place not in known][: MAX_PLACES + 1 - len(known)]
            self._counts[reason] += number
        for column in counts["unread"]:
            self.add(UNREAD + column, "")

    def lines(self) -> list[str]:
        """Returns one line per reason: "prompts: 9 dropped: an empty turn; first at x.jsonl:7, then :8, :12, …"."""
        unread = [*self._unread][:MAX_UNREAD] + ["…"] * (len(self._unread) > MAX_UNREAD)
        return [
            f"{self.what}: {n} {reason}{self._details[reason]}; first at {self._where(reason)}"
            for reason, n in self._counts.items()
        ] + [f"{self.what}: {UNREAD}{', '.join(unread)}"] * bool(unread)

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


def parse_each(records: Iterable[Record], parse: Callable[[Record], Parsed], tally: Tally) -> list[Parsed | None]:
    """Returns what `parse` makes of each record; None for those that it raises BadRecord for, which are counted."""
    found: list[Parsed | None] = []
    for record in records:
        try:
            found.append(parse(record))
        except BadRecord as error:
            tally.add(f"dropped: {error}", record.source)
            found.append(None)
    return found
