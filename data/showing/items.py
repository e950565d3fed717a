"""Records as prompts, dialogues or preferences, their tokens, and what of them was read."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from data.encode import encode_answers, encode_dialogues, encode_prompts
from data.formats.columns import FormOptions, map_columns
from data.formats.dialogue_forms import COLUMN, parse_dialogue
from data.formats.dialogue_forms import form_of as dialogue_form_of
from data.formats.preference_forms import form_of as preference_form_of
from data.formats.prompt_forms import parse_prompt
from data.formats.records import BadRecord, Record, Tally
from data.preferences import MARGIN_COLUMNS, Pair, parse_preferences
from data.template import Turns

KINDS = ("prompts", "dialogues", "preferences")
NO_LIMIT = 2**40  # tokens
Side = tuple[list[int], list[bool]]  # token ids, mask of those that are learnt


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

    def characters(self) -> list[int]:
        """Returns the number of characters of the turns, with each answer if there are `answers`."""
        size = sum(len(turn["content"]) for turn in self.turns)
        return [size + len(answer) for answer in self.answers or [""]]

    def learnt_characters(self) -> int:
        """Returns the number of characters of the answers."""
        answers = (turn["content"] for turn in self.turns if self.kind == "dialogues" and turn["role"] == "assistant")
        return sum(map(len, (*answers, *self.answers)))


def parse(record: Record, tally: Tally, kind: str, options: FormOptions) -> list[Item]:
    """Returns the items of a kind that the training commands read from a record. Raises BadRecord."""
    if kind == "preferences":
        read = parse_preferences(record, tally, MARGIN_COLUMNS, options)
        return [Item(kind, one.history, one.answers, one.pairs) for one in read]
    if kind == "prompts":
        turns, columns = parse_prompt(record.value, options, tally.once(record.source))
        return [Item(kind, turns, columns=columns)]
    return [Item(kind, parse_dialogue(record.value, options, tally.once(record.source)))]


def kind_of(record: Record, options: FormOptions) -> str:
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
    return f"{form.name} (keys {', '.join(sorted(value))})"


def shape(value: Any, depth: int = 3) -> str:
    """Returns keys and types of a record: "{messages: [{role: text, content: text}]}"."""
    if isinstance(value, dict) and depth:
        return "{" + ", ".join(f"{key}: {shape(item, depth - 1)}" for key, item in value.items()) + "}"
    if isinstance(value, list) and depth:
        return f"[{', '.join(Counter(shape(item, depth - 1) for item in value))}]"
    names = {str: "text", bool: "true/false", type(None): "null", dict: "{…}", list: "[…]"}
    return names.get(type(value), "number")


def encode(items: list[Item], tokenizer, template: str, limit: int) -> list[tuple[int, list[Side]] | None]:
    """Returns (number of turns removed, ids and mask per answer) per item of one kind; None: it does not fit."""
    if not items:
        return []
    kind, turns = items[0].kind, [item.turns for item in items]
    if kind == "prompts":
        found = encode_prompts(tokenizer, turns, template, limit)
        rows = [(left, ids and [(ids, [False] * len(ids))]) for left, ids in found]
    elif kind == "dialogues":
        found = encode_dialogues(tokenizer, turns, template, limit)
        rows = [(left, ids and [(ids, mask)]) for left, ids, mask, _ in found]
    else:
        found = encode_answers(tokenizer, [(item.turns, item.answers) for item in items], template, limit)
        rows = [(left, sides and [_side(*side) for side in sides]) for left, sides in found]
    return [sides and (len(before) - len(left), sides) for before, (left, sides) in zip(turns, rows, strict=True)]


def _side(prompt: list[int], answer: list[int], trained: int) -> Side:
    return prompt + answer, [False] * len(prompt) + [True] * trained + [False] * (len(answer) - trained)
