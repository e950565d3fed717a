"""Records of data with their places, and counts of those that cannot be used."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from data.order import order
from utils.errors import Say, UserError
from utils.watchdog import with_progress

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


def load_items(
    path: str, what: str, parse: Callable[[Record, Tally], Item], num_valid: int, seed: int, say: Say,
    flag: str = FLAG, lower: bool = False,
) -> tuple[list[Item], list[Item]]:  # fmt: skip
    """Reads the data at `path`, parses each record and returns (train, valid) items. flag: the flag that gave the path.

    valid: of *valid* files or the hub's validation split; without them, `num_valid` items chosen by the seed (lower: a
    tenth of all if that is more than half). Records for which `parse` raises BadRecord are dropped and counted.
    """
    from data.sources import read_records

    train_records, valid_records = read_records(path, flag)
    tally = Tally(what)
    train = _parse_all(train_records, parse, tally)
    valid = _parse_all(valid_records or [], parse, tally)
    tally.report(say)
    for items, purpose in ((train, ""), (valid, " for validation")):
        if not items and (items is train or valid_records is not None):
            reasons = "; ".join(tally.lines()) or "it has no records"
            raise UserError(f"{flag} {path}: no usable {what} left{purpose} ({reasons}); fix them, or use other data")
    if valid_records is None and num_valid > 0:
        if lower and num_valid > len(train) // 2:
            say(f"{what}: the default of {num_valid} held-out records is lowered, as there are {len(train)}")
            num_valid = max(1, len(train) // 10)
        if num_valid >= len(train):
            problem = f"{len(train)} usable {what} are too few to hold out {num_valid} for validation"
            raise UserError(f"{flag} {path}: {problem}; add data, add a *valid.json file, or hold out fewer")
        chosen = order(0, len(train), len(train), seed)
        valid = [train[i] for i in sorted(chosen[:num_valid])]
        train = [train[i] for i in sorted(chosen[num_valid:])]
        say(f"{what}: no validation file in {path}: {num_valid} held out by seed {seed}")
    say(f"{what}: {len(train)} to train on, {len(valid)} to validate on, from {path}")
    return train, valid


def _parse_all(records: list[Record], parse: Callable[[Record, Tally], Item], tally: Tally) -> list[Item]:
    items = []
    for record in with_progress(records, f"reading of {tally.what}"):
        try:
            items.append(parse(record, tally))
        except BadRecord as error:
            tally.add(f"dropped: {error}", record.source)
    return items
