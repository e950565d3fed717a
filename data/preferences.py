"""Load preferences for reward models: a history, answers to it, and pairs of a better and a worse answer."""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.formats.dialogue_forms import check_turns, from_hh, is_hh, parse_history, parse_turns, with_system
from data.formats.ranked_answers import is_ranked, ranked_pairs
from data.formats.records import FLAG, BadRecord, Record, Tally, load_items
from data.formats.score_columns import STRENGTH, read_number, read_strength
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
    lower: bool = False,
) -> tuple[list[Preference], list[Preference]]:  # fmt: skip
    """Returns (train, valid) preferences; drops malformed records and reports their counts with `say`.

    Formats: {"chosen", "rejected"} as dialogues with the same history, in lists or Anthropic's text format; {"prompt"
    or "conversations", "chosen", "rejected"}; {"prompt", "responses"} (ranked_answers.py). Optional columns: "system",
    "subset", "mean preference difference", score lists. margin_columns: columns with a margin, the first that a record
    has; (): no margins. The margin of ranked answers is their score difference. Raises UserError if the data is
    unreadable or nothing is left.
    """
    parse = partial(parse_preference, margin_columns=margin_columns)
    return load_items(path, "preferences", parse, num_valid, seed, say, lower=lower)


def parse_preference(record: Record, tally: Tally, margin_columns: tuple[str, ...] = ()) -> Preference:
    """Returns the preference of one record in any format of `load_preferences`. Raises BadRecord with the reason."""
    value, subset = record.value, _subset_of(record)
    if is_ranked(value):
        history = parse_history(value["prompt"]) if value.get("prompt") is not None else []
        answers, ranking = ranked_pairs(value, record.source, tally)
        for answer in answers:
            check_turns([*history, {"role": "assistant", "content": answer}])
        pairs = [Pair(i, j, margin=gap if margin_columns else None) for i, j, gap in ranking]
        return Preference(check_turns(history), [answer.strip() for answer in answers], pairs, subset, record.source)
    chosen, rejected = _sides_of(value)
    strength = read_strength(value)
    margins = (read_number(value, name) for name in margin_columns)
    margin = next((margin for margin in margins if margin is not None), None)
    if margin is None and STRENGTH in margin_columns:
        margin = strength  # from the score lists
    answers = [chosen[-1]["content"], rejected[-1]["content"]]
    return Preference(chosen[:-1], answers, [Pair(0, 1, strength, margin)], subset, record.source)


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


def _sides_of(value: Any) -> tuple[Turns, Turns]:
    """Returns the dialogues of chosen and rejected, which differ only in the last answer."""
    if not isinstance(value, dict) or "chosen" not in value or "rejected" not in value:
        raise BadRecord("not an object with the keys chosen and rejected, or prompt and responses")
    history = next((value[key] for key in ("prompt", "conversations") if value.get(key) is not None), [])
    prompt = with_system(parse_history(history), value) if history != [] else []
    chosen, rejected = (_dialogue(value[key], key, prompt) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise BadRecord("the histories of chosen and rejected differ")
    if chosen[-1] == rejected[-1]:
        raise BadRecord("chosen and rejected are the same answer")
    return chosen, rejected


def _dialogue(value: Any, key: str, prompt: Turns) -> Turns:
    """Returns the dialogue of one side of a pair, with `prompt` in front unless the side includes the history."""
    if isinstance(value, str) and is_hh(value):
        turns = check_turns(from_hh(value))
    elif isinstance(value, str) and prompt:
        turns = check_turns([*prompt, {"role": "assistant", "content": value}])
    elif isinstance(value, dict) and prompt:
        turns = check_turns([*prompt, *parse_history([value])])
    elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | dict) and prompt:
        turns = _dialogue(value[0], key, prompt)
    elif isinstance(value, list):
        turns = parse_turns(value)
    else:
        raise BadRecord(f"{key} is neither a dialogue nor an answer to a prompt")
    if turns[-1]["role"] != "assistant":
        raise BadRecord(f"{key} does not end in an answer of the assistant")
    return turns


def _subset_of(record: Record) -> str:
    """Returns the record's `subset`, or its file's name without train or valid ("helpful_valid.jsonl": helpful)."""
    named = record.value.get("subset") if isinstance(record.value, dict) else None
    if named is not None:
        if not isinstance(named, str) or not named.strip() or has_lone_surrogate(named):
            raise BadRecord("subset is not a name")
        return named.strip()
    stem = Path(record.source.rpartition(":")[0]).stem
    return re.sub(r"[-_.[]?(train|valid|validation)]?$", "", stem) or "all"
