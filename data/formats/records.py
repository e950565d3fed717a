"""Records of data with their places, and counts of those that cannot be used."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FLAG = "--data_path"
MAX_PLACES = 5  # places named per reason
SEEN = ": it has the columns "  # begins the part of a reason that differs between records; the first one is shown
UNREAD = "not read: "  # begins the reason for a column that no form reads
MAX_UNREAD = 20  # columns named as not read
Counts = dict[str, list]  # of a tally, as JSON


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
