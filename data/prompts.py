"""Load prompts for PPO: encoded dialogues that end in a question, within a token limit."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.formats.dialogue_forms import parse_turns
from data.formats.records import BadRecord, Record, Tally, load_items
from data.formats.truncate import newest_turns
from data.template import Turns, encode_prompt
from utils.errors import Say

PROMPT_KEYS = ("messages", "conversations", "prompt", "system", "instruction", "input")  # other columns stay with it


@dataclass(frozen=True)
class Prompt:
    """A prompt: its token ids up to the start of the answer, its turns, the place and other columns of its record."""

    ids: list[int]
    turns: Turns
    source: str
    columns: dict[str, Any] = field(default_factory=dict)


def load_prompts(
    path: str, tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int, num_valid: int, seed: int,
    say: Say = print, lower: bool = False,
) -> tuple[list[Prompt], list[Prompt]]:  # fmt: skip
    """Returns (train, valid) prompts of at most `max_tokens` tokens from data in any format of dialogue_forms.py.

    The answer at the end of a dialogue is removed. Too long prompts lose their oldest exchanges, or are dropped. Raises
    UserError if the data cannot be read or no prompt is left.
    """
    parse = partial(_prompt_of, tokenizer=tokenizer, template=template, max_tokens=max_tokens)
    return load_items(path, "prompts", parse, num_valid, seed, say, lower=lower)


def _prompt_of(
    record: Record, tally: Tally, tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int
) -> Prompt:
    turns = parse_turns(record.value)
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]
        tally.add("ended in the assistant's answer, which was cut off", record.source)
    full = len(turns)

    def encode(turns: Turns) -> list[int] | None:
        ids = encode_prompt(tokenizer, turns, template)
        return ids if len(ids) <= max_tokens else None

    turns, ids = newest_turns(turns, encode, max_tokens)
    if ids is None:
        raise BadRecord(f"longer than --maxlen_prompt - --maxlen_res = {max_tokens} tokens")
    if len(turns) < full:
        tally.add("truncated (oldest turns dropped)", record.source)
    columns = record.value if isinstance(record.value, dict) else {}
    return Prompt(ids, turns, record.source, {key: columns[key] for key in columns if key not in PROMPT_KEYS})
