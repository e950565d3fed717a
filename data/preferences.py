"""Preferences for the reward model: one history, answers to it, and which of them people liked better."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.formats.dialogue_forms import check_turns, from_hh, history_of, is_hh, turns_of
from data.formats.json_lines import has_half_pair
from data.formats.ranked_answers import is_ranked, ranked_pairs
from data.formats.records import FLAG, BadRecord, Record, Tally, load_items
from data.formats.score_columns import STRENGTH, number_of, strength_of
from data.template import Turns
from utils.errors import UserError

MARGIN_COLUMNS = (STRENGTH, "margin")  # where a pair's margin is looked for, unless a column is named


@dataclass(frozen=True)
class Pair:
    """Places of the better and the worse answer among a preference's `answers`.

    strength: mean score difference over several reward models, if known (negative: they disagree with the label);
    margin: by how much the better answer is to win, if known and asked for.
    """

    better: int
    worse: int
    strength: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Preference:
    """Answers to one `history` and the pairs to learn from: one of two answers, or all of a ranked list's.

    `subset` is what the evaluation groups by; `source` is where the record stands.
    """

    history: Turns
    answers: list[str]
    pairs: list[Pair]
    subset: str
    source: str


def load_preferences(
    path: str,
    num_valid: int,
    seed: int,
    say: Callable[[str], None] = print,
    margin_columns: tuple[str, ...] = (),
    lower: bool = False,
) -> tuple[list[Preference], list[Preference]]:
    """(train, valid) preferences of `path`, in four forms:

    {"chosen", "rejected"} as whole dialogues with a shared history, in lists or in Anthropic's text form; {"prompt",
    "chosen", "rejected"}; {"prompt", "responses"}, best first or with "scores" or "ranks"; the first three with an
    optional "mean preference difference" (or both score lists), all with an optional "subset". margin_columns: where
    margins are looked for, the first that a record has; none: not read. Ranked answers with scores have the difference
    of these for a margin. Pairs whose histories differ, whose answers are equal or empty, and malformed records are
    dropped, counted and said. Raises UserError when the data cannot be read or nothing is left.
    """
    parse = partial(preference_of, margin_columns=margin_columns)
    return load_items(path, "preferences", parse, num_valid, seed, say, lower=lower)


def preference_of(record: Record, tally: Tally, margin_columns: tuple[str, ...] = ()) -> Preference:
    """One record in any of the forms above. Raises BadRecord, saying why."""
    value, subset = record.value, _subset_of(record)
    if is_ranked(value):
        history = history_of(value["prompt"]) if value.get("prompt") is not None else []
        answers, ranking = ranked_pairs(value, record.source, tally)
        for answer in answers:
            check_turns([*history, {"role": "assistant", "content": answer}])
        pairs = [Pair(i, j, margin=gap if margin_columns else None) for i, j, gap in ranking]
        return Preference(check_turns(history), [answer.strip() for answer in answers], pairs, subset, record.source)
    chosen, rejected = _sides_of(value)
    strength = strength_of(value)
    margins = (number_of(value, name) for name in margin_columns)
    margin = next((margin for margin in margins if margin is not None), None)
    if margin is None and STRENGTH in margin_columns:
        margin = strength  # known from the score lists alone
    answers = [chosen[-1]["content"], rejected[-1]["content"]]
    return Preference(chosen[:-1], answers, [Pair(0, 1, strength, margin)], subset, record.source)


def flip_negative(preferences: list[Preference], say: Callable[[str], None] = print) -> list[Preference]:
    """The preferences, with the sides of every pair whose strength is negative swapped; how many is said.

    Strength and margin of a swapped pair become positive. Part II §2: a negative mean over an ensemble mostly marks
    a wrong label. Raises UserError when no pair has a strength.
    """
    pairs = [pair for preference in preferences for pair in preference.pairs]
    known = sum(pair.strength is not None for pair in pairs)
    if not known:
        raise UserError(f"--flip_negative: no pair of {FLAG} has a {STRENGTH!r}; python -m reward.strength adds it")
    tally = Tally("preferences")
    for preference in preferences:
        for pair in preference.pairs:
            if pair.strength is None:
                tally.add(f"without a {STRENGTH!r}, kept as they are", preference.source)
            elif pair.strength < 0:
                tally.add(f"of {known} flipped, since their {STRENGTH!r} is negative", preference.source)
    for line in tally.lines():
        say(line)
    return [replace(p, pairs=[_flipped(pair) for pair in p.pairs]) for p in preferences]


def check_margins(preferences: list[Preference], columns: tuple[str, ...], say: Callable[[str], None]) -> None:
    """Says how many pairs have no margin, for which 0 is taken. Raises UserError when none has one."""
    tally = Tally("preferences")
    for preference in preferences:
        for pair in preference.pairs:
            if pair.margin is None:
                tally.add("without a margin, trained with margin 0", preference.source)
    if all(pair.margin is None for preference in preferences for pair in preference.pairs):
        names = " or ".join(map(repr, columns))
        raise UserError(
            f"--use_margin: no pair of {FLAG} has a number in the column {names}; name yours with --margin_column, or "
            "leave --use_margin out"
        )
    for line in tally.lines():
        say(line)


def _flipped(pair: Pair) -> Pair:
    if pair.strength is None or pair.strength >= 0:
        return pair
    # A margin from the same column has the strength's sign; one that people gave is not below 0 anyway.
    margin = None if pair.margin is None else abs(pair.margin)
    return Pair(pair.worse, pair.better, -pair.strength, margin)


def _sides_of(value: Any) -> tuple[Turns, Turns]:
    """The dialogues of chosen and rejected, which differ in the last answer alone."""
    if not isinstance(value, dict) or "chosen" not in value or "rejected" not in value:
        raise BadRecord("not an object with the keys chosen and rejected, or prompt and responses")
    prompt = history_of(value["prompt"]) if value.get("prompt") is not None else []
    chosen, rejected = (_dialogue(value[key], key, prompt) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise BadRecord("the histories of chosen and rejected differ")
    if chosen[-1] == rejected[-1]:
        raise BadRecord("chosen and rejected are the same answer")
    return chosen, rejected


def _dialogue(value: Any, key: str, prompt: Turns) -> Turns:
    """History and answer from one side of a pair; `prompt` goes in front unless the side already begins with it."""
    if isinstance(value, str) and is_hh(value):
        turns = check_turns(from_hh(value))
    elif isinstance(value, str) and prompt:
        turns = check_turns([*prompt, {"role": "assistant", "content": value}])
    elif isinstance(value, list) and len(value) == 1 and prompt:
        answer = value[0].get("content") if isinstance(value[0], dict) else value[0]
        turns = _dialogue(answer, key, prompt) if isinstance(answer, str) else turns_of(value)
    elif isinstance(value, list):
        turns = turns_of(value)
    else:
        raise BadRecord(f"{key} is neither a dialogue nor an answer to a prompt")
    if turns[-1]["role"] != "assistant":
        raise BadRecord(f"{key} does not end in an answer of the assistant")
    return turns


def _subset_of(record: Record) -> str:
    """The record's own `subset`, else its file's name without train or valid ("helpful_valid.jsonl": helpful)."""
    named = record.value.get("subset") if isinstance(record.value, dict) else None
    if named is not None:
        if not isinstance(named, str) or not named.strip() or has_half_pair(named):
            raise BadRecord("subset is not a name")
        return named.strip()
    stem = Path(record.source.rpartition(":")[0]).stem
    return re.sub(r"[-_.[]?(train|valid|validation)]?$", "", stem) or "all"
