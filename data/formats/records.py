"""Data files to records that know where they stand, and the tally of what could not be used.

Local JSON is parsed here, because only then every record has its line; hub ids and other formats go through
`datasets`. Everything is held in memory: the published sets have some 100,000 dialogues, a few hundred MB.
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
from utils.errors import UserError
from utils.hub import is_hub_id

FLAG = "--data_path"
LONGEST = 200  # characters of a path in a message
PLACES = 5  # of each kind of what is dropped or changed, that are named
_TABLES = {".parquet": "parquet", ".csv": "csv"}
Item = TypeVar("Item")


class BadRecord(ValueError):
    """One record that cannot be used; the message says why. Loaders count it and go on."""


@dataclass(frozen=True)
class Record:
    """One parsed record and where it stands, as "file.json:12"."""

    value: Any
    source: str


class Tally:
    """Counts what was dropped or changed while loading, with the places of the first few of each kind."""

    def __init__(self, what: str):
        self.what = what
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, source: str) -> None:
        """Count one record at `source` under `reason`."""
        places = self._places[reason]
        self._counts[reason] += 1
        if len(places) <= PLACES and source not in places:  # in a file of one line all records stand in the same place
            places.append(source)

    def lines(self) -> list[str]:
        """One line a reason: "prompts: 9 dropped: an empty turn; first at x.json:7, then :8, :12, :30, :31, …"."""
        return [f"{self.what}: {n} {reason}; first at {self._where(reason)}" for reason, n in self._counts.items()]

    def _where(self, reason: str) -> str:
        split = [place.rpartition(":") for place in self._places[reason]]
        then = [f":{line}" if file == before else f"{file}:{line}" for (before, *_), (file, _, line) in pairwise(split)]
        if len(then) == PLACES:
            then[-1] = "…"
        return self._places[reason][0] + (", then " + ", ".join(then) if then else "")


def load_items(
    path: str, what: str, parse: Callable[[Record, Tally], Item], num_valid: int, seed: int, say: Callable[[str], None],
    flag: str = FLAG, lower: bool = False,
) -> tuple[list[Item], list[Item]]:  # fmt: skip
    """Read `path`, which `flag` gave, `parse` every record, and split into (train, valid).

    The valid set is the folder's *valid* files or the hub's validation split; failing that, `num_valid` items off
    the seeded order (lower: a tenth of all, if it is more than half). A record for which `parse` raises BadRecord is
    dropped; all such, and all that `parse` adds to the tally, are said. Raises UserError when nothing is left to train
    on.
    """
    train_records, valid_records = read_records(path, flag)
    tally = Tally(what)
    train = _parse_all(train_records, parse, tally)
    valid = _parse_all(valid_records or [], parse, tally)
    for line in tally.lines():
        say(line)
    if not train:
        reasons = "; ".join(tally.lines()) or "it holds no records"
        raise UserError(f"{flag} {path}: no usable {what} left ({reasons}); mend them, or give others")
    if valid_records is not None and not valid:
        raise UserError(f"{flag} {path}: no usable {what} left for validation ({'; '.join(tally.lines())}); mend them")
    if valid_records is None and num_valid > 0:
        if lower and num_valid > len(train) // 2:
            say(f"{what}: the default of {num_valid} held-out records is lowered, as there are {len(train)}")
            num_valid = max(1, len(train) // 10)
        if num_valid >= len(train):
            raise UserError(
                f"{flag} {path}: {len(train)} usable {what} are too few to hold out {num_valid} for validation; "
                "add data, a *valid.json file, or hold out fewer"
            )
        chosen = order(0, len(train), len(train), seed)
        valid = [train[i] for i in sorted(chosen[:num_valid])]
        train = [train[i] for i in sorted(chosen[num_valid:])]
        say(f"{what}: no validation file in {path}: {num_valid} held out by seed {seed}")
    say(f"{what}: {len(train)} to train on, {len(valid)} to validate on, from {path}")
    return train, valid


def _parse_all(records: list[Record], parse: Callable[[Record, Tally], Item], tally: Tally) -> list[Item]:
    items = []
    for record in records:
        try:
            items.append(parse(record, tally))
        except BadRecord as error:
            tally.add(f"dropped: {error}", record.source)
    return items


def read_records(path: str, flag: str = FLAG) -> tuple[list[Record], list[Record] | None]:
    """(train, valid) records of a folder, file or hub id; valid is None where there is no validation file or split.

    Raises UserError, naming `flag` or file:line, for what is missing, unreadable, empty or not parseable.
    """
    if os.path.isdir(path):
        return _read_folder(Path(path), flag)
    if os.path.isfile(path):
        return read_file(Path(path), flag), None
    if is_hub_id(path):
        return _read_hub(path, flag)
    shown = path if len(path) <= LONGEST else f"{path[:LONGEST]}…"  # a record, pasted where its file belongs
    raise UserError(f"{flag}: {shown} does not exist; give a folder, a .json or .jsonl file, or a hub id (owner/name)")


def read_file(file: Path, flag: str = FLAG) -> list[Record]:
    """All records of one file. Raises UserError when it holds none or cannot be parsed."""
    suffix = file.suffix.lower()
    if suffix in _TABLES:
        return _from_datasets(_TABLES[suffix], str(file), flag, data_files=str(file))["train"]
    if suffix not in (".json", ".jsonl"):
        raise UserError(f"{flag}: {file} has the unknown ending {suffix!r}; use .json, .jsonl, .parquet or .csv")
    values = (parse_json_lines if suffix == ".jsonl" else parse_json_list)(file, flag)
    if not values:
        raise UserError(f"{flag}: {file} is empty; it should hold at least one record")
    return [Record(value, f"{file}:{line}") for value, line in values]


def _read_folder(folder: Path, flag: str) -> tuple[list[Record], list[Record] | None]:
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".jsonl"))
    split = {name: [file for file in files if file.stem.endswith(name)] for name in ("train", "valid")}
    if not split["train"]:
        found = ", ".join(file.name for file in files) or "no JSON files at all"
        raise UserError(f"{flag}: no *train.json or *train.jsonl in {folder} ({found}); rename the file or name it")
    train, valid = ([record for file in split[name] for record in read_file(file, flag)] for name in ("train", "valid"))
    return train, valid if split["valid"] else None


def _read_hub(name: str, flag: str) -> tuple[list[Record], list[Record] | None]:
    splits = _from_datasets(name, name, flag)
    if "train" not in splits:
        raise UserError(f"{flag}: the data set {name} has no split called train, only {', '.join(splits)}")
    return splits["train"], splits.get("validation", splits.get("valid"))


def _from_datasets(builder: str, name: str, flag: str, **options: Any) -> dict[str, list[Record]]:
    """All splits through `datasets`; imported here, since local JSON does not need it and it takes a second."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it would log is in the error that is raised too
    try:
        splits = datasets.load_dataset(builder, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{flag}: cannot load {name} ({reason}); check the name, or download it first") from error
    return {
        split: [Record(row, f"{name}[{split}]:{i}") for i, row in enumerate(rows, start=1)]
        for split, rows in splits.items()
    }
