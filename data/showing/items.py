"""Records as prompts, dialogues or preferences, their tokens, and what of them was read."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from data.encode import encode_answers, encode_dialogues, encode_prompts
from data.formats.columns import FormOptions
from data.formats.dialogue_forms import parse_turns
from data.formats.preference_forms import form_of
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
    note = partial(_note, tally, record.source)
    if kind == "preferences":
        read = parse_preferences(record, tally, MARGIN_COLUMNS, options)
        return [Item(kind, one.history, one.answers, one.pairs) for one in read]
    if kind == "prompts":
        turns, columns = parse_prompt(record.value, options, note)
        return [Item(kind, turns, columns=columns)]
    turns = parse_turns(record.value, options=options, note=note)
    if all(turn["role"] != "assistant" for turn in turns):
        raise BadRecord("no answer of the assistant")
    if turns[-1]["role"] == "user":
        note("ended in a question without an answer, which was cut off")
        turns = turns[:-1]
    return [Item(kind, turns)]


def form_options(config) -> FormOptions:
    """Returns what the flags say about the form of records."""
    columns = tuple(tuple(pair.split("=", 1)) for pair in config.columns)
    return FormOptions(columns, config.prompt_template, config.preferred_by, config.reasoning)


def _note(tally: Tally, source: str, reason: str) -> None:
    tally.add(reason, source)


def kind_of(record: Record, options: FormOptions) -> str:
    """Returns what a record can be used as: preferences, else by its last turn; "" for nothing."""
    for kind in ("preferences", "dialogues", "prompts"):
        try:
            parse(record, Tally(""), kind, options)
            return kind
        except BadRecord:
            continue
    return ""


def form_name(value: Any, kind: str) -> str:
    """Returns the name of a record's form and its keys, or its shape."""
    form = form_of(value) if kind == "preferences" else None
    keys = f"keys {', '.join(sorted(value))}" if isinstance(value, dict) else shape(value)
    return f"{form.name}, {keys}" if form else keys


def shape(value: Any, depth: int = 3) -> str:
    """Returns keys and types of a record: "{messages: [{role: text, content: text}]}"."""
    if isinstance(value, dict) and depth:
        return "{" + ", ".join(f"{key}: {shape(item, depth - 1)}" for key, item in value.items()) + "}"
    if isinstance(value, list) and depth:
        return f"[{', '.join(Counter(shape(item, depth - 1) for item in value))}]"
    names = {str: "text", bool: "true/false", type(None): "null", dict: "{…}", list: "[…]"}
    return names.get(type(value), "number")


def unread(record: Record, read: Callable[[Record], list[Item]]) -> set[str]:
    """Returns the keys of a usable record without which its items are the same."""
    if not isinstance(record.value, dict):
        return set()
    items, keys = read(record), set()
    for key in record.value:
        rest = {name: value for name, value in record.value.items() if name != key}
        try:
            if read(Record(rest, record.source)) == items:
                keys.add(key)
        except BadRecord:
            continue
    return keys


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
