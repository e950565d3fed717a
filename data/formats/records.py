"""Read data files into records with their places, and count the records that cannot be used.

JSON is parsed here, so that each record has a line; other formats and hub ids go through `datasets`. All records are
held in memory: published data sets take a few hundred MB.
"""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from data.formats.json_lines import parse_json_lines, parse_json_list
from data.order import order
from utils.errors import Say, UserError
from utils.files import split_files
from utils.hub import is_hub_id
from utils.watchdog import downloading, with_progress

FLAG = "--data_path"
MAX_PATH = 200  # characters of a path in a message
MAX_PLACES = 5  # places named per reason
SEEN = ": it has the columns "  # begins the part of a reason that differs between records; the first one is shown
UNREAD = "not read: "  # begins the reason for a column that no form reads
MAX_UNREAD = 20  # columns named as not read
_TABLES = {".parquet": "parquet", ".csv": "csv"}
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


def load_items(
    path: str, what: str, parse: Callable[[Record, Tally], Item], num_valid: int, seed: int, say: Say,
    flag: str = FLAG, lower: bool = False,
) -> tuple[list[Item], list[Item]]:  # fmt: skip
    """Reads the data at `path`, parses each record and returns (train, valid) items. flag: the flag that gave the path.

    valid: of *valid* files or the hub's validation split; without them, `num_valid` items chosen by the seed (lower: a
    tenth of all if that is more than half). Records for which `parse` raises BadRecord are dropped and counted.
    """
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


def read_records(path: str, flag: str = FLAG) -> tuple[list[Record], list[Record] | None]:
    """Returns (train, valid) records of a folder, file or hub id; valid is None if it has none. Raises UserError."""
    if os.path.isdir(path):
        return _read_folder(Path(path), flag)
    if os.path.isfile(path):
        return read_file(Path(path), flag), None
    if is_hub_id(path):
        return _read_hub(path, flag)
    if os.path.exists(path):  # each rank reads it, and a resumed run again
        raise UserError(f"{flag}: {path} is a pipe or a device; write its content to a file, and pass that")
    shown = path if len(path) <= MAX_PATH else f"{path[:MAX_PATH]}…"  # users may pass a whole record by mistake
    raise UserError(f"{flag}: {shown} does not exist; use a folder, a .json or .jsonl file, or a hub id (owner/name)")


def read_file(file: Path, flag: str = FLAG) -> list[Record]:
    """Returns all records of one file. Raises UserError if the file has none or cannot be parsed."""
    suffix = file.suffix.lower()
    if suffix in _TABLES:
        return _from_datasets(_TABLES[suffix], str(file), flag, data_files=str(file))["train"]
    if suffix not in (".json", ".jsonl"):
        raise UserError(f"{flag}: {file} has the unknown ending {suffix!r}; use .json, .jsonl, .parquet or .csv")
    values = (parse_json_lines if suffix == ".jsonl" else parse_json_list)(file, flag)
    if not values:
        raise UserError(f"{flag}: {file} has no records; use a file with at least one")
    return [Record(value, f"{file}:{position}") for value, position in values]


def _read_folder(folder: Path, flag: str) -> tuple[list[Record], list[Record] | None]:
    try:
        split = split_files(folder)
    except OSError as error:
        raise UserError(f"{flag}: cannot read {folder}: {error.strerror}; use a folder that can be read") from error
    if not split[0]:
        files = sorted(file.name for file in folder.iterdir() if file.suffix in (".json", ".jsonl"))
        found = ", ".join(files) or "no JSON files at all"
        raise UserError(f"{flag}: no *train.json or *train.jsonl in {folder} ({found}); rename a file or pass its path")
    train, valid = ([record for file in files for record in read_file(file, flag)] for files in split)
    return train, valid if split[1] else None


def _read_hub(name: str, flag: str) -> tuple[list[Record], list[Record] | None]:
    splits = _from_datasets(name, name, flag)
    if "train" not in splits:
        raise UserError(f"{flag}: the data set {name} has no train split, only {', '.join(splits)}; use another")
    return splits["train"], splits.get("validation", splits.get("valid"))


def _from_datasets(builder: str, name: str, flag: str, **options: Any) -> dict[str, list[Record]]:
    """Returns the records of all splits. `datasets` is imported here: it takes a second and JSON does not need it."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # the exception contains the same message
    try:
        with downloading():
            splits = datasets.load_dataset(builder, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{flag}: cannot load {name} ({reason}); check the name, or download the data first") from error
    return {
        split: [Record(row, f"{name}[{split}]:{i}") for i, row in enumerate(rows, start=1)]
        for split, rows in splits.items()
    }
