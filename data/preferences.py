"""Load preferences for reward models: a history, answers to it, and pairs of a better and a worse answer."""

import re
from dataclasses import dataclass, replace
from typing import Any

from data.formats.columns import PLAIN, FormOptions, map_columns, shown_name
from data.formats.compared import Reader
from data.formats.preference_forms import form_of, read_by, unknown
from data.formats.records import FLAG, UNREAD, BadRecord, Record, Tally, parse_each
from data.formats.score_columns import STRENGTH, read_number, read_score_gap, read_strength
from data.formats.turns import refuse_media, refuse_tools
from data.sources import Part, all_records, parts_of
from data.template import Turns
from utils.data_files import parse_sources, stem_of
from utils.errors import Say, UserError
from utils.flags.data import RecordFlags
from utils.terminal import has_lone_surrogate
from utils.watchdog import with_progress

MARGIN_COLUMNS = (STRENGTH, "margin")  # columns with a pair's margin, unless a flag names another


@dataclass(frozen=True)
class Pair:
    """Indices of the better and the worse answer of a preference.

    strength: mean score difference over several reward models, negative if they disagree with the label. margin: target
    difference of the adaptive margin loss. None if unknown.
    """

    better: int
    worse: int
    strength: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Preference:
    """Answers to one history, and their pairs. subset: group in evaluations; source: place of the record."""

    history: Turns
    answers: list[str]
    pairs: list[Pair]
    subset: str
    source: str


def load_preferences(
    values: list[str], config: RecordFlags, say: Say = print, options: FormOptions = PLAIN
) -> tuple[list[Preference], list[Preference]]:
    """Returns all (train, valid) preferences of --data_path, in memory; reports what was dropped with `say`.

    Raises UserError if the data is unreadable or nothing is left.
    """
    found: tuple[list[Preference], list[Preference]] = ([], [])
    for source in parse_sources(values, FLAG):
        tally, parts = Tally("preferences"), parts_of(source, FLAG, config.split, config.valid_split)
        read = [[] if part is None else _parse_all(part, tally, options) for part in parts]
        tally.report(say)
        for part, items, purpose in zip(parts, read, ("", " for validation"), strict=True):
            if part is not None and not items:
                reasons = "; ".join(tally.lines())
                problem = f"no usable preferences left{purpose} ({reasons})"
                raise UserError(f"{FLAG} {source.path}: {problem}; fix them, or use other data")
        for items, more in zip(found, read, strict=True):
            items += more
    return found


def _parse_all(parts: list[Part], tally: Tally, options: FormOptions) -> list[Preference]:
    records = with_progress(all_records(parts), "reading of preferences")
    found = parse_each(records, lambda record: parse_preferences(record, tally, options=options), tally)
    return [preference for each in found if each for preference in each]


def parse_preferences(
    record: Record, tally: Tally, margin_columns: tuple[str, ...] = (), options: FormOptions = PLAIN
) -> list[Preference]:
    """Returns the preferences of a record in any form of preference_forms.py; several of a tree, else one.

    Counts in `tally` what is changed or left out. Raises BadRecord with the reason for a record that cannot be used.
    """
    value, note = map_columns(record.value, options), tally.once(record.source)
    subset, form = _subset_of(value, record), form_of(value)
    if form is None:
        raise BadRecord(unknown(value))
    refuse_media(value)
    refuse_tools(value)
    inner = replace(options, columns=(), prompt_template="") if options.columns or options.prompt_template else options
    compared = form.parse(value, Reader(inner, note))
    read = read_by(form, options, margin_columns)
    for key, item in value.items():
        if key not in read and item not in (None, "", [], {}):
            note(UNREAD + shown_name(key))
    strength = read_strength(value) if form.pair else None
    margin = _margin_of(value, strength, margin_columns) if form.pair else None
    return [
        Preference(one.history, one.answers, [
            Pair(i, j, strength, gap if margin is None and margin_columns else margin) for i, j, gap in one.pairs
        ], subset, record.source)
        for one in compared
    ]  # fmt: skip


def _margin_of(value: dict, strength: float | None, columns: tuple[str, ...]) -> float | None:
    """Returns the margin of a pair: the first of `columns` that it has; the default columns include its scores."""
    numbers = (read_number(value, name) for name in columns)
    margin = next((number for number in numbers if number is not None), None)
    if margin is None and STRENGTH in columns:
        return strength if strength is not None else read_score_gap(value)
    return margin


def _subset_of(value: Any, record: Record) -> str:
    """Returns the record's `subset`, or its file's name without train or valid ("helpful_valid.jsonl.gz": helpful)."""
    named = value.get("subset") if isinstance(value, dict) else None
    if named is not None:
        if not isinstance(named, str) or not named.strip() or has_lone_surrogate(named):
            raise BadRecord("subset is not a name")
        return named.strip()
    stem = stem_of(record.source.rpartition(":")[0])
    name = re.sub(r"-\d{5}-of-\d{5}$", "", stem)  # files of hub data sets: train-00000-of-00002.parquet
    return re.sub(r"(\[(train|valid|test).*\]|[-_.]?(train|valid|validation))$", "", name) or "all"
