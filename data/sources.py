"""Where records come from: values of a data flag, and the files and splits behind them, which stream their records."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data.formats.compressed import reading
from data.formats.json_lines import decode_line, items_of, lines_of, parse_line
from data.formats.records import FLAG, Record
from data.formats.tables import rows_of_arrow, rows_of_text
from utils.data_files import (
    SUFFIXES,
    Source,
    is_saved,
    parse_sources,
    saved_files,
    split_files,
    stem_of,
    suffix_of,
)
from utils.errors import UserError
from utils.files import first_names
from utils.flags.data import RecordFlags
from utils.hub import is_hub_id
from utils.watchdog import downloading

MAX_PATH = 200  # characters of a path in a message
_SLICE = re.compile(r"\[[^\]]*\]$")


class Raw(NamedTuple):
    """A record before it is parsed: its place, and bytes of a line or, of other formats, the value."""

    source: str
    content: Any
    is_text: bool = False  # the line is not JSON


@dataclass(frozen=True)
class Part:
    """One file, or one split of a data set of `datasets`; rows: the latter's. Streams its records."""

    name: str
    flag: str = FLAG
    rows: Any = field(default=None, compare=False)

    @property
    def size(self) -> int:
        """Bytes on the disk; of a split, in memory."""
        return self.rows.data.nbytes if self.rows is not None else os.path.getsize(self.name)

    def raw(self) -> Iterator[Raw]:
        """Yields the records in order, unparsed. Raises UserError for a damaged file when the place is reached."""
        if self.rows is not None:
            yield from (Raw(f"{self.name}:{i}", row) for i, row in enumerate(self.rows, start=1))
            return
        suffix, name = suffix_of(self.name), os.fsencode(self.name).decode(errors="backslashreplace")
        with reading(self.name, self.flag) as stream:
            if suffix in (".jsonl", ".txt"):
                yield from (Raw(f"{name}:{i}", line, suffix == ".txt") for i, line in lines_of(stream, name))
            elif suffix == ".json":
                yield from (Raw(f"{name}:record {i}", value) for i, value in items_of(stream, name))
            elif suffix in (".csv", ".tsv"):
                rows = rows_of_text(stream, name, "," if suffix == ".csv" else "\t")
                yield from (Raw(f"{name}:{line}", value) for line, value in rows)
            else:
                rows = rows_of_arrow(Path(self.name), stream, suffix, self.flag)
                yield from (Raw(f"{name}:row {i}", value) for i, value in rows)

    def records(self) -> Iterator[Record]:
        """Yields the records in order."""
        return map(parse_raw, self.raw())


def parse_raw(raw: Raw) -> Record:
    """Returns the record. Raises UserError with file and line for broken JSON and text that is not UTF-8."""
    if not isinstance(raw.content, bytes):
        return Record(raw.content, raw.source)
    name, _, line = raw.source.rpartition(":")
    text = decode_line(raw.content, name, int(line))
    return Record(text.strip() if raw.is_text else parse_line(text, name, int(line)), raw.source)


def parts_of(
    source: Source, flag: str = FLAG, split: str = "train", valid_split: str = ""
) -> tuple[list[Part], list[Part] | None]:
    """Returns the (training, held-out) parts of a source, None if it has no held-out ones. Raises UserError.

    split, valid_split: names of --split and --valid_split, for data sets that have splits.
    """
    path, split = source.path, source.split or split
    if os.path.exists(path) and (source.config or _SLICE.search(split)):
        named = f":{source.config}" if source.config else f"@{split}"
        raise UserError(f"{flag}: {named} is for hub ids, and {path} is a local path; remove it")
    if os.path.isdir(path):
        if is_saved(path):
            return _saved(path, flag, split, valid_split)
        return _folder(Path(path), flag, split, valid_split)
    if os.path.isfile(path):
        if source.split:
            raise UserError(f"{flag}: @{source.split}: {path} is a file, which has no splits; remove it")
        check_ending(path, flag)
        return [Part(path, flag)], None
    if is_hub_id(path):
        return _hub(source, flag, split, valid_split)
    if os.path.exists(path):  # each rank reads it, and a resumed run again
        raise UserError(f"{flag}: {path} is a pipe or a device; write its content to a file, and pass that")
    shown = path if len(path) <= MAX_PATH else f"{path[:MAX_PATH]}…"  # users may pass a whole record by mistake
    raise UserError(f"{flag}: {shown} does not exist; check the name of the file or folder, or the hub id (owner/name)")


def left_out(source: Source, split: str, valid_split: str) -> list[str]:
    """Returns the names of data files in a folder that are not read."""
    folder = Path(source.path)
    if not folder.is_dir() or is_saved(folder):
        return []
    read = {file for files in split_files(folder, source.split or split, valid_split) for file in files}
    files = [*folder.iterdir(), *(folder / "data").glob("*")]
    return sorted(str(file.relative_to(folder)) for file in files if suffix_of(file) in SUFFIXES and file not in read)


def check_ending(path: str, flag: str) -> None:
    """Raises UserError for a file whose ending names no format that is read."""
    if suffix_of(path) not in SUFFIXES:
        known = "use .json, .jsonl, .csv, .tsv, .parquet, .arrow or .txt, also with .gz, .zst, .bz2 or .xz"
        raise UserError(f"{flag}: {path} has the unknown ending {Path(path).suffix!r}; {known}")


def read_records(values: list[str], config: RecordFlags, flag: str = FLAG) -> tuple[list[Record], list[Record]]:
    """Returns all (training, held-out) records of the values of a data flag. Raises UserError."""
    found: tuple[list[Record], list[Record]] = ([], [])
    for source in parse_sources(values, flag):
        for records, parts in zip(found, parts_of(source, flag, config.split, config.valid_split), strict=True):
            records += all_records(parts or [])
    return found


def all_raw(parts: list[Part]) -> Iterator[Raw]:
    """Yields the records of all parts, unparsed. Raises UserError for a part without records."""
    for part in parts:
        records = part.raw()
        if (first := next(records, None)) is None:
            raise UserError(f"{part.flag}: {part.name} has no records; use a file with at least one")
        yield first
        yield from records


def all_records(parts: list[Part]) -> Iterator[Record]:
    """Yields the records of all parts. Raises UserError as `all_raw` and `parse_raw` do."""
    return map(parse_raw, all_raw(parts))


def _folder(folder: Path, flag: str, split: str, valid_split: str) -> tuple[list[Part], list[Part] | None]:
    try:
        train, valid = split_files(folder, split, valid_split)
    except OSError as error:
        raise UserError(f"{flag}: cannot read {folder}: {error.strerror}; use a folder that can be read") from error
    if not train:
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if suffix_of(file) in SUFFIXES)
        found = first_names(files) or "no data files at all"
        raise UserError(
            f"{flag}: no *{split}.json or *{split}.jsonl in {folder} ({found}); rename a file or pass its path"
        )
    stems = Counter(stem_of(file) for file in [*train, *valid])
    if twice := next((stem for stem, number in stems.items() if number > 1), None):
        same = " and ".join(file.name for file in [*train, *valid] if stem_of(file) == twice)
        raise UserError(f"{flag}: {folder} has {same}, which may be copies; rename or remove one, or pass a path")
    if valid_split and not valid:
        raise UserError(f"{flag}: no *{valid_split}* file in {folder}; rename a file, or pass another --valid_split")
    train, valid = ([Part(str(file), flag) for file in files] for files in (train, valid))
    return train, valid or None


def _saved(path: str, flag: str, split: str, valid_split: str) -> tuple[list[Part], list[Part] | None]:
    """Returns the parts of a folder that `datasets` saved: its .arrow files, which are read in batches."""
    try:
        splits = saved_files(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{flag}: {path} was not saved whole by `datasets` ({error}); save it again") from error
    if set(splits) == {""}:
        if split != "train":
            raise UserError(f"{flag}: {path} was saved without splits, and has no {split}; remove --split or @{split}")
        return [Part(file, flag) for file in splits[""]], None
    train, valid = _choose_splits(splits, path, flag, split, valid_split)
    return [Part(file, flag) for file in train], valid and [Part(file, flag) for file in valid]


def _hub(source: Source, flag: str, split: str, valid_split: str) -> tuple[list[Part], list[Part] | None]:
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # the exception contains the same message
    name, config = source.path, source.config
    try:
        with downloading():
            cut = _SLICE.search(split)
            splits = datasets.load_dataset(name, config)
            train, valid = _choose_splits(splits, name, flag, _SLICE.sub("", split), valid_split)
            if cut:
                train = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{flag}: cannot load {name} ({reason}); check the name, or download the data first") from error
    named = f"{name}:{config}" if config else name
    held_out = None if valid is None else [Part(f"{named}[{valid.split}]", flag, valid)]
    return [Part(f"{named}[{split}]", flag, train)], held_out


def _choose_splits(splits: dict, name: str, flag: str, split: str, valid_split: str) -> tuple[Any, Any]:
    for wanted, option in ((split, "--split"), (valid_split, "--valid_split")):
        if wanted and wanted not in splits:
            has = f"has no {wanted} split, only {', '.join(splits)}"
            raise UserError(f"{flag}: the data set {name} {has}; use another, or name one with {option}")
    if not valid_split and split == "train":
        valid_split = next((each for each in ("validation", "valid") if each in splits), "")
    return splits[split], splits[valid_split] if valid_split else None
