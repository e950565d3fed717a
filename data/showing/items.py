"""Records as prompts, dialogues or preferences, their tokens, and what of them was read."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.encode import encode_answers, encode_dialogues, encode_prompts
from data.formats.columns import FormOptions, map_columns
from data.formats.dialogue_forms import COLUMN, parse_dialogue
from data.formats.dialogue_forms import form_of as dialogue_form_of
from data.formats.preference_forms import form_of as preference_form_of
from data.formats.prompt_forms import parse_prompt
from data.formats.records import BadRecord, Record, Tally
from data.preferences import MARGIN_COLUMNS, Pair, parse_preferences
from data.template import Turns

NO_LIMIT = 2**40  # tokens
MAX_RAW = 400  # characters that are shown of a record as it is
_PAIR = re.compile("chosen|reject|better|worse|prefer|winner|rank|score", re.IGNORECASE)
Side = tuple[Sequence[int], list[bool]]  # token ids (without a tokenizer: characters), mask of those that are learnt


class Encoded(NamedTuple):
    """Ids and mask per answer; number of turns that were removed, and of answers that the template rewrites."""

    sides: list[Side]
    removed: int = 0
    rewritten: int = 0


@dataclass(frozen=True)
class Item:
    """A sample to train on. turns: a prompt, a dialogue, or the history of a preference, which alone has `answers`."""

    kind: str
    turns: Turns
    answers: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> Turns:
        """The turns before the (last) answer."""
        return self.turns[:-1] if self.kind == "dialogues" else self.turns


def parse(record: Record, tally: Tally, kind: str, options: FormOptions) -> list[Item]:
    """Returns the items of a kind that the training commands read from a record. Raises BadRecord."""
    if kind == "preferences":
        read = parse_preferences(record, tally, MARGIN_COLUMNS, options)
        return [Item(kind, one.history, one.answers, one.pairs) for one in read]
    if kind == "prompts":
        turns, columns = parse_prompt(record.value, options, tally.once(record.source))
        return [Item(kind, turns, columns=columns)]
    return [Item(kind, parse_dialogue(record.value, options, tally.once(record.source)))]


def usable_as(record: Record, options: FormOptions) -> str:
    """Returns what a record can be used as: preferences, else by its last turn; "" for nothing."""
    for kind in ("preferences", "dialogues", "prompts"):
        try:
            parse(record, Tally(""), kind, options)
            return kind
        except BadRecord:
            continue
    return ""


def form_name(value: Any, kind: str, options: FormOptions) -> str:
    """Returns the name of a usable record's form and its keys; its shape if it is no object."""
    if not isinstance(value, dict):
        return shape(value)
    mapped = map_columns(value, options)
    form = kind == "preferences" and preference_form_of(mapped)
    form = form or (dialogue_form_of(mapped, options) or (preference_form_of(mapped) or COLUMN,))[0]
    return f"{form.name} (keys {short(', '.join(sorted(value)))})"


def looks_paired(value: Any) -> bool:
    """Returns whether a record that cannot be used seems to be a preference, by its keys."""
    return isinstance(value, dict) and any(map(_PAIR.search, value))


def short(text: str) -> str:
    """Returns the beginning of a text."""
    return text if len(text) <= MAX_RAW else f"{text[:MAX_RAW]}…"


def shape(value: Any, depth: int = 3) -> str:
    """Returns keys and types of a record: "{messages: [{role: text, content: text}]}"."""
    if isinstance(value, dict) and depth:
        return "{" + ", ".join(f"{key}: {shape(item, depth - 1)}" for key, item in value.items()) + "}"
    if isinstance(value, list) and depth:
        return f"[{', '.join(Counter(shape(item, depth - 1) for item in value))}]"
    names = {str: "text", bool: "true/false", type(None): "null", dict: "{…}", list: "[…]"}
    return names.get(type(value), "number")


def encode(items: list[Item], tokenizer, template: str, limit: int) -> list[Encoded | None]:
    """Returns the encodings of items of one kind; None for one that does not fit. tokenizer: None for characters."""
    turns = [item.turns for item in items]
    if not items or tokenizer is None:
        return [Encoded(_characters(item)) for item in items]
    if items[0].kind == "prompts":
        found = encode_prompts(tokenizer, turns, template, limit)
        rows = [(left, ids and [(ids, [False] * len(ids))], 0) for left, ids in found]
    elif items[0].kind == "dialogues":
        found = encode_dialogues(tokenizer, turns, template, limit)
        rows = [(left, ids and [(ids, mask)], len(rewritten)) for left, ids, mask, rewritten in found]
    else:
        found = encode_answers(tokenizer, [(item.turns, item.answers) for item in items], template, limit)
        rows = [(left, sides and [_side(*side) for side in sides], 0) for left, sides in found]
    return [
        Encoded(sides, len(whole) - len(left), rewritten) if sides else None
        for whole, (left, sides, rewritten) in zip(turns, rows, strict=True)
    ]


def _side(prompt: list[int], answer: list[int], trained: int) -> Side:
    return prompt + answer, [False] * len(prompt) + [True] * trained + [False] * (len(answer) - trained)


def _characters(item: Item) -> list[Side]:
    mask: list[bool] = []
    for turn in item.turns:
        mask += [item.kind == "dialogues" and turn["role"] == "assistant"] * len(turn["content"])
    masks = [mask + [True] * len(answer) for answer in item.answers or [""]]
    return [(range(len(mask)), mask) for mask in masks]
