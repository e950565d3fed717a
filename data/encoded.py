"""Encoded data sets: a list if they are small; else a file that workers make once per node and all ranks map."""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar, overload

from data.cache import EncodedFile, batched, encode_batch, encode_to_file, open_rows
from data.formats.columns import FormOptions
from data.formats.records import FLAG, Record, Tally
from data.order import mixture, order
from data.sources import Part, all_records, left_out, parts_of
from utils.data_files import COMPRESSED, Source, parse_sources
from utils.errors import Say, UserError
from utils.files import first_names
from utils.flags.data import RecordFlags
from utils.run.together import once_per_node
from utils.watchdog import with_progress

SMALL = 16 << 20  # bytes of data that every rank holds as a list
BATCH = 256  # records that are encoded at once
Row = dict[str, Any]
Item = TypeVar("Item")


class Encoder(Protocol[Item]):
    """Makes rows of records and items of rows. A dataclass: its fields, and `columns`, are part of the cache's key.

    what, limit: name of the items, and limit of their tokens, for messages. columns: name of a row's column -> type, as
    "list<int32>" or "string".
    """

    what: str
    columns: dict[str, str]

    @property
    def limit(self) -> str:
        """The flags that limit the tokens, and their value."""
        ...

    def __call__(self, records: list[Record], tally: Tally) -> list[list[Row] | None]:
        """Returns the rows of each record: None if it cannot be used, [] if it is too long; `tally` counts both."""
        ...

    def item(self, row: Row) -> Item:
        """Returns the item of a row."""
        ...


class EncodedSet(Sequence[Item]):
    """Items of one set of records, without those of some rows. rows: a list, or a mapped file of `datasets`."""

    def __init__(self, rows: Sequence[Row], encoder: Encoder[Item], without: Sequence[int] = ()):
        self.rows, self.encoder = rows, encoder
        self.without = sorted(without)
        self._shift = [row - k for k, row in enumerate(self.without)]

    def __len__(self) -> int:
        return len(self.rows) - len(self.without)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.encoder.item(self.rows[index + bisect_right(self._shift, index)])

    def each(self, *columns: str) -> Iterator[Row]:
        """Yields these columns of each row, without making items."""
        if isinstance(self.rows, list):
            rows = iter(self.rows)
        else:
            batches = self.rows.select_columns(list(columns)).iter(10 * BATCH)
            rows = (
                dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True)
            )
        left_out = set(self.without)
        return (row for i, row in enumerate(rows) if i not in left_out)


@dataclass(frozen=True)
class Mixture(Generic[Item]):
    """Sets with the share of each in the order of a run. weights: None: each item of all sets once per epoch.

    num_held_out: number of records that were held out of the sets, also of those that are too long.
    """

    sets: list[EncodedSet[Item]]
    weights: list[float] | None
    seed: int
    num_held_out: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def take(self, start: int, count: int) -> list[Item]:
        """Returns the items at `count` places of the run from `start` on; depends on sets, weights and seed only."""
        if self.weights is not None:
            places = mixture(start, count, list(map(len, self.sets)), self.weights, self.seed)
            return [self.sets[k][i] for k, i in places]
        ends = list(accumulate(map(len, self.sets)))
        items = []
        for index in order(start, count, ends[-1], self.seed):
            k = bisect_right(ends, index)
            items.append(self.sets[k][index - (ends[k - 1] if k else 0)])
        return items

    def first(self, count: int) -> list[Item]:
        """Returns the first items of the sets, at most `count`."""
        return [item for items in self.sets for item in items[:count]][:count]

    def each(self, *columns: str) -> Iterator[Row]:
        """Yields these columns of each row of all sets."""
        return (row for rows in self.sets for row in rows.each(*columns))

    def made_by(self, encoder: Encoder[Item]) -> "Mixture[Item]":
        """Returns the mixture with items that another encoder makes of the rows."""
        return replace(self, sets=[EncodedSet(rows.rows, encoder, rows.without) for rows in self.sets])

    def batches(self, size: int) -> Iterator[list[Item]]:
        """Yields batches without end."""
        start = 0
        while True:
            yield self.take(start, size)
            start += size


def form_options(config: RecordFlags) -> FormOptions:
    """Returns what the flags say about the form of records."""
    columns = tuple(tuple(pair.split("=", 1)) for pair in config.columns)
    return FormOptions(columns, config.prompt_template, config.preferred_by, config.reasoning)


def load_encoded(
    values: list[str], encoder: Encoder[Item], config: RecordFlags, num_valid: int, seed: int, say: Say,
    flag: str = FLAG, lower: bool = False,
) -> tuple[Mixture[Item], list[Item]]:  # fmt: skip
    """Returns (training items, held-out items) of the values of a data flag. Collective.

    Held out: the records of *valid* files or a validation split; without them, `num_valid` records of each source that
    the seed chooses among those that can be used (lower: a tenth if that is more than half). Reports what was dropped
    or changed. Raises UserError if a source cannot be read or has nothing that can be used.
    """
    sources = parse_sources(values, flag)
    sets, held_out, total = [], [], 0
    for source in sources:
        train, valid, number = _load(source, encoder, config, num_valid, seed, say, flag, lower)
        sets.append(train)
        held_out, total = held_out + valid, total + number
        if len(sources) > 1 and not len(train):
            problem = f"all {encoder.what} exceed {encoder.limit}"
            raise UserError(f"{flag} {source.path}: {problem}; raise it, or remove this source")
    weights = [source.weight for source in sources]
    return Mixture(sets, weights if sources[0].weight is not None else None, seed, total), held_out


def _load(
    source: Source, encoder: Encoder[Item], config: RecordFlags, num_valid: int, seed: int, say: Say, flag: str,
    lower: bool,
) -> tuple[EncodedSet[Item], list[Item], int]:  # fmt: skip
    what, path = encoder.what, source.path
    found = once_per_node(lambda: _encode(source, encoder, config, say, flag))
    for line in found.lines:
        say(line)
    for part, purpose in ((found.train, ""), (found.valid, " for validation")):
        if part is not None and not part.usable:
            reasons = "; ".join(found.lines) or "it has no records"
            raise UserError(f"{flag} {path}: no usable {what} left{purpose} ({reasons}); fix them, or use other data")
    rows = open_rows(found.train)
    chosen, valid = [], []
    if found.valid is not None:
        valid, num_valid = list(EncodedSet(open_rows(found.valid), encoder)), found.valid.usable
    elif num_valid:
        usable = found.train.usable
        if lower and num_valid > usable // 2:
            say(f"{what}: the default of {num_valid} held-out records is lowered, as there are {usable}")
            num_valid = max(1, usable // 10)
        if num_valid >= usable:
            problem = f"{usable} usable {what} are too few to hold out {num_valid} for validation"
            raise UserError(f"{flag} {path}: {problem}; add data, add a *valid.json file, or hold out fewer")
        chosen = _rows_of(rows, sorted(order(0, num_valid, usable, seed)))
        valid = [encoder.item(rows[i]) for i in chosen]
        say(f"{what}: no validation file in {path}: {num_valid} held out by seed {seed}")
    train = EncodedSet(rows, encoder, chosen)
    say(f"{what}: {len(train)} to train on, {len(valid)} to validate on, from {path}")
    return train, valid, num_valid


def _rows_of(rows: Sequence[Row], records: list[int]) -> list[int]:
    """Returns the rows of usable records, by their column `record`, which ascends."""
    found = []
    for record in records:
        start = bisect_left(range(len(rows)), record, key=lambda i: rows[i]["record"])
        stop = start
        while stop < len(rows) and rows[stop]["record"] == record:
            stop += 1
        found += range(start, stop)
    return found


@dataclass(frozen=True)
class _Found:
    """What one source has. lines: what is to be reported."""

    train: EncodedFile
    valid: EncodedFile | None
    lines: list[str]


def _encode(source: Source, encoder: Encoder, config: RecordFlags, say: Say, flag: str) -> _Found:
    train, valid = parts_of(source, flag, config.split, config.valid_split)
    tally = Tally(encoder.what)
    encode = _encode_here
    if sum(map(_weight, [*train, *(valid or [])])) >= SMALL:
        encode = lambda parts, *given: encode_to_file(parts, *given, config, say)  # noqa: E731
    found = [None if parts is None else encode(parts, encoder, tally) for parts in (train, valid)]
    others = left_out(source, config.split, config.valid_split)
    named = [f"{encoder.what}: not read of {source.path}: {first_names(others)}"] if others else []
    return _Found(*found, tally.lines() + named)


def _weight(part: Part) -> int:
    """Returns about the number of bytes of a part without compression."""
    return part.size * (4 if os.path.splitext(part.name)[1].lower() in (*COMPRESSED, ".parquet") else 1)


def _encode_here(parts: list[Part], encoder: Encoder, tally: Tally) -> EncodedFile:
    rows, usable = [], 0
    for batch in batched(with_progress(all_records(parts), f"reading of {tally.what}"), BATCH):
        made, count = encode_batch(batch, encoder, tally, usable)
        rows += made
        usable += count
    return EncodedFile(usable, rows)
