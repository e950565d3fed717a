"""The report of `python -m data.show`: reads all records once, and those that it names a second time."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from tqdm import tqdm

from data.encoded import form_options
from data.formats.records import FLAG, SEEN, BadRecord, Record, Tally
from data.showing.counts import Counts, Duplicates, bins, joined, overlap, quantile, repeated
from data.showing.items import NO_LIMIT, Encoded, Item, encode, form_name, looks_paired, parse, shape, short, usable_as
from data.showing.pages import LEGEND, Section
from data.showing.pieces import Piece, token_pieces, turn_pieces
from data.sources import Part, all_records, parts_of
from utils.data_files import Source, parse_sources

CHUNK = 256  # records that are encoded together
SAMPLE = 20  # records that decide the kind
EXAMPLES = 3  # reasons with an example
BAR = 40  # characters of the longest bar


@dataclass
class Split:
    """The training or the held-out data of one source, and what is counted of it."""

    source: Source
    name: str
    parts: list[Part]
    limit: int | None
    counts: Counts = field(default_factory=Counts)
    views: list[Section] = field(default_factory=list)

    def records(self) -> Iterator[Record]:
        """Yields the records."""
        return islice(all_records(self.parts), self.limit)

    def places(self) -> Iterator[str]:
        """Yields the place of each record, without parsing it."""
        return (raw.source for raw in islice(chain.from_iterable(part.raw() for part in self.parts), self.limit))


class Look:
    """What turns records into counts and views: the flags, the tokenizer, and counts over all splits."""

    def __init__(self, config, kind: str, tokenizer, template: str):
        self.config, self.kind, self.tokenizer, self.template = config, kind, tokenizer, template
        self.forms, self.unit = form_options(config), "tokens" if tokenizer else "characters"
        self.tally, self.shapes, self.first = Tally(kind), Counter(), {}
        self.dropped: dict[str, Record] = {}

    def parsed(self, record: Record, tally: Tally) -> list[Item]:
        """Returns the items of a record. Raises BadRecord."""
        return parse(record, tally, self.kind, self.forms)

    def take(self, split: Split) -> None:
        """Reads, encodes and counts the records of a split; the first usable ones become views."""
        records = iter(tqdm(split.records(), unit=" records", disable=None))  # None: in a terminal only
        while chunk := list(islice(records, CHUNK)):
            read = [(record, self.read(record)) for record in chunk]
            sides = iter(self.encoded([item for _, items in read for item in items]))
            for record, items in read:
                split.counts.add_record(items)
                for item in items:
                    self.count(split, record, item, *next(sides))

    def read(self, record: Record) -> list[Item]:
        """Returns the items of a record, and counts its form; none, and counts the reason, if it cannot be used."""
        try:
            items = self.parsed(record, self.tally)
        except BadRecord as error:
            self.tally.add(f"dropped: {error!s}", record.source)
            if len(self.dropped) < EXAMPLES:
                self.dropped.setdefault(str(error).partition(SEEN)[0], record)
            return []
        name = form_name(record.value, self.kind, self.forms)
        if name in self.first or len(self.first) < CHUNK:
            self.shapes[name] += 1
            self.first.setdefault(name, record.source)
        return items

    def encoded(self, items: list[Item]) -> list[tuple[Encoded, Encoded | None]]:
        """Returns per item its encoding without a limit, and that within --context_truncate or None."""
        limit = self.config.context_truncate if self.tokenizer else NO_LIMIT
        whole = encode(items, self.tokenizer, self.template, NO_LIMIT)
        is_long = [max(len(ids) for ids, _ in row.sides) > limit for row in whole]
        cut = iter(encode([i for i, x in zip(items, is_long, strict=True) if x], self.tokenizer, self.template, limit))
        return [(row, next(cut) if x else row) for row, x in zip(whole, is_long, strict=True)]

    def count(self, split: Split, record: Record, item: Item, whole: Encoded, kept: Encoded | None) -> None:
        """Counts an item with its encodings."""
        split.counts.add(item, [len(ids) for ids, _ in whole.sides])
        note = self.tally.once(record.source)
        if kept is None:
            note("dropped: the last exchange alone exceeds --context_truncate")
            return
        if kept.removed:
            note("truncated (oldest turns dropped) to --context_truncate")
        if kept.rewritten:
            note(
                "with earlier answers that the template rewrites, each used as a sample of its own and not counted here"
            )
        tokens, learnt = sum(len(ids) for ids, _ in kept.sides), sum(sum(mask) for _, mask in kept.sides)
        split.counts.named.update(usable=1, truncated=kept.removed > 0, tokens=tokens, learnt=learnt)
        if len(split.views) < self.config.num_records:
            split.views.append(self.view(record, item, kept))

    def view(self, record: Record, item: Item, kept: Encoded) -> Section:
        """Returns what is shown of a record: its keys, what is noted of it, and its tokens or texts."""
        lines, own = [f"record: {short(shape(record.value))}"], Tally("this record")
        if item.columns:
            lines.append(f"columns for a reward function: {short(', '.join(item.columns))}")
        self.parsed(record, own)
        lines += own.lines()
        chosen, labels = [0], [""]
        if item.pairs:
            pair = item.pairs[0]
            chosen, labels = [pair.better, pair.worse], ["chosen", "rejected"]
            margin = "" if pair.margin is None else f", margin {pair.margin:g}"
            lines.append(f"pair 1 of {len(item.pairs)}, of {len(item.answers)} answers{margin}")
        if self.tokenizer:
            sides = [token_pieces(self.tokenizer, kept.sides[k]) for k in chosen]
        else:
            sides = [turn_pieces(item, k if item.pairs else None) for k in chosen]
        lines.append(f"{self.unit}: {', '.join(str(len(kept.sides[k][0])) for k in chosen)}")
        if item.kind == "prompts":
            sides[0].append(Piece("(the answer begins here)", is_learnt=True))
        return Section(record.source, lines, sides=list(zip(labels, sides, strict=True)), level=3)


def report(config) -> tuple[list[Section], str]:
    """Returns the sections of the report, and the problem if no record can be used. Raises UserError."""
    splits = []
    for source in parse_sources(config.data_path, FLAG):
        for name, parts in zip(("train", "held out"), parts_of(source, FLAG, config.split, config.valid_split)):
            if parts is not None:
                splits.append(Split(source, name, parts, config.max_records or None))
    tokenizer, template = None, ""
    if config.tokenizer_name_or_path:
        from data.choose_template import prepare_tokenizer

        tokenizer, template = prepare_tokenizer(config, config.tokenizer_name_or_path, [], print)
    kind, found = choose_kind(config, splits[0])
    look = Look(config, kind, tokenizer, template)
    for split in splits:
        look.take(split)
    usable = sum(split.counts.named["usable"] for split in splits)
    paths = " ".join(config.data_path)
    problem = f"{FLAG} {paths}: no usable {kind}, for the reasons above; fix the records, or pass --kind or --columns"
    return sections_of(look, splits, found), "" if usable else problem


def choose_kind(config, split: Split) -> tuple[str, str]:
    """Returns (kind, how it was found), from --kind or the first records."""
    if config.kind != "auto":
        return config.kind, "by --kind"
    records = list(islice(split.records(), SAMPLE))
    kinds = Counter(usable_as(record, form_options(config)) for record in records)
    found = [kind for kind, _ in kinds.most_common() if kind]
    words = ", ".join(f"{number} {kind or 'of no known form'}" for kind, number in kinds.most_common())
    guess = "preferences" if any(looks_paired(record.value) for record in records) else "dialogues"
    return (found or [guess])[0], f"the first {len(records)} records are: {words}; --kind sets it"


def sections_of(look: Look, splits: list[Split], found: str) -> list[Section]:
    """Returns the whole report."""
    unit, batch = look.unit, look.config.batch_size
    table: list[list] = [["source", "split", "weight", "records", look.kind, "truncated", unit, "learnt", "steps"]]
    for split in splits:
        named, weight = split.counts.named, split.source.weight
        numbers = [len(split.counts.records), *(named[name] for name in ("usable", "truncated", "tokens", "learnt"))]
        steps = named["usable"] // batch if split.name == "train" else ""
        table.append([split.source.path, split.name, "" if weight is None else f"{weight:g}", *numbers, steps])
    forms = [f"{name}: {number}, first at {look.first[name]}" for name, number in look.shapes.most_common(5)]
    sections = [Section("Records", [f"used as {look.kind} ({found})", LEGEND])]
    sections += [*chain.from_iterable(split.views for split in splits), Section("Forms", forms)]
    sections += [Section("Counts", [f"steps: of one epoch at --batch_size {batch}"], table)]
    sections += [Section("Dropped and changed", look.tally.lines() or ["nothing"])]
    for reason, record in look.dropped.items():
        sides = [("", [Piece(short(json.dumps(record.value, ensure_ascii=False, default=str)))])]
        sections.append(Section(record.source, [reason], sides=sides, level=3))
    if lengths := sum((split.counts.lengths for split in splits), Counter()):
        sections.append(length_section(look, lengths, unit))
        sections.append(Section("Checks", [*duplicate_lines(splits), *other_lines(splits, unit)]))
    return sections


def length_section(look: Look, lengths: Counter[int], unit: str) -> Section:
    """Returns quantiles and a histogram of the lengths, and the share beyond --context_truncate."""
    marks = [f"half of them up to {quantile(lengths, 0.5)}", f"95 % up to {quantile(lengths, 0.95)}"]
    lines = [f"{', '.join(marks)}, the longest {max(lengths)}"]
    if look.tokenizer:
        limit = look.config.context_truncate
        beyond = sum(number for length, number in lengths.items() if length > limit)
        lines.append(f"longer than --context_truncate {limit}: {beyond} ({beyond / lengths.total():.1%})")
    sizes = bins(lengths)
    most = max(number for _, number in sizes)
    rows = [[name, "█" * round(BAR * n / most), n, f"{n / lengths.total():.1%}"] for name, n in sizes]
    return Section(f"Lengths in {unit}", lines, [[unit, "", look.kind, "share"], *rows])


def duplicate_lines(splits: list[Split]) -> list[str]:
    """Returns lines about records that repeat, within the training data and between it and the held-out data."""
    train, valid = ([split for split in splits if split.name == name] for name in ("train", "held out"))
    lines = []
    for name, what in (("prompts", "the prompt"), ("records", "prompt and answer")):
        first, second = (joined([getattr(split.counts, name) for split in part]) for part in (train, valid))
        lines.append(_named(f"records that repeat {what} of an earlier one", repeated(first), train, train))
        if valid:
            lines.append(_named(f"held-out records with {what} of training data", overlap(first, second), train, valid))
    return lines


def _named(what: str, found: Duplicates, first: list[Split], second: list[Split]) -> str:
    number, pairs = found
    ours, theirs = (places(splits, [pair[k] for pair in pairs]) for k, splits in enumerate((first, second)))
    examples = "; ".join(f"{theirs[later]} as {ours[earlier]}" for earlier, later in pairs)
    return f"{what}: {number}" + f" ({examples}{'; …' * (number > len(pairs))})" * bool(pairs)


def places(splits: list[Split], indices: list[int]) -> dict[int, str]:
    """Returns the places of records by their number in the splits together."""
    rows = enumerate(chain.from_iterable(split.places() for split in splits))
    wanted = islice(rows, max(indices) + 1) if indices else ()
    return {k: place for k, place in wanted if k in set(indices)}


def other_lines(splits: list[Split], unit: str) -> list[str]:
    """Returns lines about system turns and, for preferences, about the lengths of the two answers."""
    named = sum((split.counts.named for split in splits), Counter())
    lines = [f"records with a system turn: {named['system']}"]
    pairs, total, longer, shorter = map(sum, zip(*(split.counts.differences for split in splits), strict=True))
    if pairs:
        lines.append(
            f"chosen minus rejected: {total / pairs:+.1f} {unit} on average; chosen is longer in {longer / pairs:.1%} "
            f"of {pairs} pairs, shorter in {shorter / pairs:.1%}"
        )
        lines.append(f"pairs whose answers differ in white space only: {named['blank']}")
    return lines
