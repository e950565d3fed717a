"""Prompts for PPO: encoded dialogues that end in a question, within a token limit."""

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from data.encode import encode_prompts
from data.formats.columns import FormOptions
from data.formats.prompt_forms import parse_prompt
from data.formats.records import Record, Tally, parse_each
from data.template import Turns


@dataclass(frozen=True)
class Prompt:
    """A prompt: its token ids up to the start of the answer, its turns, the place and other columns of its record."""

    ids: list[int]
    turns: Turns
    source: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptEncoder:
    """Makes prompts of at most `max_tokens` tokens of records in any form of dialogue_forms.py; see data/encoded.py.

    The answer at the end of a dialogue is removed. Too long prompts lose their oldest exchanges, or are dropped.
    """

    what: ClassVar[str] = "prompts"
    columns: ClassVar[dict[str, str]] = {
        "ids": "list<int32>", "turns": "string", "source": "string", "record_columns": "string"
    }  # fmt: skip
    tokenizer: PreTrainedTokenizerBase
    template: str
    max_tokens: int
    options: FormOptions

    def __call__(self, records: list[Record], tally: Tally) -> list[list[dict] | None]:
        parsed = parse_each(records, lambda one: parse_prompt(one.value, self.options, tally.once(one.source)), tally)
        kept = [turns for turns, _ in filter(None, parsed)]
        encoded = iter(encode_prompts(self.tokenizer, kept, self.template, self.max_tokens))
        return [
            found and self._rows(record, *found, *next(encoded), tally)
            for record, found in zip(records, parsed, strict=True)
        ]

    def _rows(
        self, record: Record, whole: Turns, columns: dict, turns: Turns, ids: list[int] | None, tally: Tally
    ) -> list[dict] | None:
        if ids is None:
            tally.add(f"dropped: longer than {self.limit}", record.source)
            return None
        if len(turns) < len(whole):
            tally.add("truncated (oldest turns dropped)", record.source)
        turns, columns = (json.dumps(value, default=str) for value in (turns, columns))
        return [{"ids": ids, "turns": turns, "source": record.source, "record_columns": columns}]

    @property
    def limit(self) -> str:
        """The flags that limit the tokens, and their value."""
        return f"--maxlen_prompt - --maxlen_res = {self.max_tokens} tokens"

    def item(self, row: dict) -> Prompt:
        """Returns the prompt of a row."""
        return Prompt(row["ids"], json.loads(row["turns"]), row["source"], json.loads(row["record_columns"]))
