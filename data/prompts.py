"""Prompts for PPO: dialogues that wait for the assistant's answer, encoded, within the token budget."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from data.formats.dialogue_forms import turns_of
from data.formats.records import BadRecord, Record, Tally, load_items
from data.template import Turns, encode_prompt


@dataclass(frozen=True)
class Prompt:
    """Token ids up to where the answer begins, the turns that they encode, and where the record stands."""

    ids: list[int]
    turns: Turns
    source: str


def load_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_tokens: int,
    num_valid: int,
    seed: int,
    say: Callable[[str], None] = print,
    lower: bool = False,
) -> tuple[list[Prompt], list[Prompt]]:
    """(train, valid) prompts of `path` in any form of data/formats/dialogue_forms.py, each at most `max_tokens` long.

    A dialogue that ends in the assistant's answer loses it. One that is too long loses its oldest exchanges, and is
    dropped when the last question alone does not fit. All of that is counted and said. Raises UserError when the data
    cannot be read or nothing is left.
    """
    parse = partial(_prompt_of, tokenizer=tokenizer, template=template, max_tokens=max_tokens)
    return load_items(path, "prompts", parse, num_valid, seed, say, lower=lower)


def _prompt_of(
    record: Record, tally: Tally, tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int
) -> Prompt:
    turns = turns_of(record.value)
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]
        tally.add("ended in the assistant's answer, which was cut off", record.source)
    full = len(turns)
    ids = encode_prompt(tokenizer, turns, template)
    while len(ids) > max_tokens:
        turns = without_oldest(turns)
        if not turns:
            raise BadRecord(f"longer than --maxlen_prompt - --maxlen_res = {max_tokens} tokens")
        ids = encode_prompt(tokenizer, turns, template)
    if len(turns) < full:
        tally.add("truncated (oldest turns dropped)", record.source)
    return Prompt(ids, turns, record.source)


def without_oldest(turns: Turns) -> Turns:
    """`turns` less their oldest question and its answer, the system turn kept; [] when only one question is there."""
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    spoken = turns[len(system) :]
    return system + spoken[2:] if len(spoken) > 2 else []
