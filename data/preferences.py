"""Load preferences for reward models: a history, answers to it, and pairs of a better and a worse answer."""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.formats.columns import PLAIN, FormOptions, map_columns
from data.formats.compared import Reader
from data.formats.nearest import shown_name
from data.formats.preference_forms import form_of, read_by, unknown
from data.formats.records import FLAG, UNREAD, BadRecord, Record, Tally, load_items
from data.formats.score_columns import STRENGTH, read_number, read_score_gap, read_strength
from data.template import Turns
from utils.errors import Say, UserError
from utils.terminal import has_lone_surrogate

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
    path: str, num_valid: int, seed: int, say: Say = print, margin_columns: tuple[str, ...] = (),
    lower: bool = False, options: FormOptions = PLAIN,
) -> tuple[list[Preference], list[Preference]]:  # fmt: skip
    """Returns (train, valid) preferences; drops malformed records and reports their counts with `say`.

    Optional columns of a record: "subset", "system", "mean preference difference", score lists. margin_columns: columns
    with a margin, the first that a record has; (): no margins. The margin of ranked answers is their score difference.
    options: what the flags say about forms. Raises UserError if the data is unreadable or nothing is left.
    """
    parse = partial(parse_preferences, margin_columns=margin_columns, options=options)
    train, valid = load_items(path, "preferences", parse, num_valid, seed, say, lower=lower)
    return [one for record in train for one in record], [one for record in valid for one in record]


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


def flip_negative(preferences: list[Preference], say: Say = print) -> list[Preference]:
    """Returns the preferences with the answers of all pairs of negative strength swapped; reports how many.

    Part II §2: a negative mean over an ensemble mostly marks a wrong label. Raises UserError if no pair has a strength.
    """
    pairs = [pair for preference in preferences for pair in preference.pairs]
    known = sum(pair.strength is not None for pair in pairs)
    if not known:
        raise UserError(f"--flip_negative: no pair has a {STRENGTH!r}; use python -m reward.strength to add it")
    tally = Tally("preferences")
    for preference in preferences:
        for pair in preference.pairs:
            if pair.strength is None:
                tally.add(f"without a {STRENGTH!r}, not changed", preference.source)
            elif pair.strength < 0:
                tally.add(f"of {known} flipped, because their {STRENGTH!r} is negative", preference.source)
    tally.report(say)
    return [replace(p, pairs=[_flipped(pair) for pair in p.pairs]) for p in preferences]


def check_margins(preferences: list[Preference], columns: tuple[str, ...], say: Say) -> None:
    """Reports the number of pairs without a margin, which get margin 0. Raises UserError if no pair has one."""
    tally = Tally("preferences")
    for preference in preferences:
        for pair in preference.pairs:
            if pair.margin is None:
                tally.add("without a margin, trained with margin 0", preference.source)
    if all(pair.margin is None for preference in preferences for pair in preference.pairs):
        names = " or ".join(map(repr, columns))
        raise UserError(f"--use_margin: no pair of {FLAG} has a number in the column {names}; pass --margin_column")
    tally.report(say)


def _flipped(pair: Pair) -> Pair:
    if pair.strength is None or pair.strength >= 0:
        return pair
    # A margin from the strength column has the sign of the strength; margins by annotators are not negative.
    margin = None if pair.margin is None else abs(pair.margin)
    return Pair(pair.worse, pair.better, -pair.strength, margin)


def file_stem(record: Record) -> str:
    """Returns the name of a record's file without its folder and endings ("a/x.jsonl.gz": "x")."""
    return Path(re.sub(r"\.(gz|zst|bz2|xz)$", "", record.source.rpartition(":")[0])).stem


def _subset_of(value: Any, record: Record) -> str:
    """Returns the record's `subset`, or its file's name without train or valid ("helpful_valid.jsonl.gz": helpful)."""
    named = value.get("subset") if isinstance(value, dict) else None
    if named is not None:
        if not isinstance(named, str) or not named.strip() or has_lone_surrogate(named):
            raise BadRecord("subset is not a name")
        return named.strip()
    name = re.sub(r"-\d{5}-of-\d{5}$", "", file_stem(record))  # files of hub data sets: train-00000-of-00002.parquet
    return re.sub(r"(\[(train|valid|test).*\]|[-_.]?(train|valid|validation))$", "", name) or "all"
