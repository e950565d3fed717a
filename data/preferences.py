"""Preferences for the reward model: one history, two answers, and which of them people liked better."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.records import BadRecord, Record, Tally, load_items
from data.template import Turns
from data.turns import check_turns, from_hh, history_of, is_hh, turns_of

_STRENGTHS = ("mean preference difference", "mean_preference_difference")


@dataclass(frozen=True)
class Preference:
    """`chosen` and `rejected` answer the same `history`; `strength` is the mean score difference over several reward
    models, if known (negative: they disagree with the label). `source` is where the record stands."""

    history: Turns
    chosen: str
    rejected: str
    strength: float | None
    source: str


def load_preferences(
    path: str, num_valid: int, seed: int, say: Callable[[str], None] = print
) -> tuple[list[Preference], list[Preference]]:
    """(train, valid) pairs of `path`, in three forms:

    {"chosen", "rejected"} as whole dialogues with a shared history, in lists or in Anthropic's text form; and
    {"prompt", "chosen", "rejected"}; each with an optional "mean preference difference". Pairs whose histories differ,
    whose answers are equal or empty, and malformed records are dropped, counted and said. Raises UserError when the
    data cannot be read or nothing is left.
    """
    return load_items(path, "preferences", _preference_of, num_valid, seed, say)


def _preference_of(record: Record, tally: Tally) -> Preference:
    value = record.value
    if not isinstance(value, dict) or "chosen" not in value or "rejected" not in value:
        raise BadRecord("not an object with the keys chosen and rejected")
    prompt = history_of(value["prompt"]) if value.get("prompt") is not None else []
    chosen, rejected = (_dialogue(value[key], key, prompt) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise BadRecord("the histories of chosen and rejected differ")
    if chosen[-1] == rejected[-1]:
        raise BadRecord("chosen and rejected are the same answer")
    return Preference(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], _strength_of(value), record.source)


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


def _strength_of(value: dict) -> float | None:
    strength = next((value[key] for key in _STRENGTHS if value.get(key) is not None), None)
    if strength is None:
        return None
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise BadRecord("mean preference difference is not a finite number")
    return float(strength)
