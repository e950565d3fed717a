"""Encoded dialogues for SFT and for the pre-training (ptx) loss, which train on the assistant's answers."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from data.encode import encode_dialogues
from data.formats.columns import FormOptions
from data.formats.dialogue_forms import parse_dialogue
from data.formats.records import Record, Tally, parse_each
from data.template import last_answer
from data.texts import Texts


@dataclass(frozen=True)
class EncodedDialogue:
    """Token ids of a dialogue, a mask of the tokens to train on (the answers), and the place of the record."""

    ids: list[int]
    answer_mask: list[bool]
    source: str = ""


@dataclass(frozen=True)
class DialogueEncoder:
    """Makes encoded dialogues of at most `max_tokens` tokens of records in any form; see data/encoded.py.

    A last question without an answer is removed. Too long dialogues lose their oldest exchanges, or are dropped. An
    earlier answer that the template rewrites in the history becomes an additional sample that ends in it and trains on
    it only. flag: the flag that gave the limit.
    """

    what: ClassVar[str] = "dialogues"
    columns: ClassVar[dict[str, str]] = {"ids": "list<int32>", "borders": "list<int32>", "source": "string"}
    tokenizer: PreTrainedTokenizerBase
    template: str
    max_tokens: int
    options: FormOptions
    flag: str = "--context_truncate"

    def __call__(self, records: list[Record], tally: Tally) -> list[list[dict] | None]:
        parsed = parse_each(records, lambda one: parse_dialogue(one.value, self.options, tally.once(one.source)), tally)
        rows: list[list[dict] | None] = [None if turns is None else [] for turns in parsed]
        waiting = [(i, turns, False) for i, turns in enumerate(parsed) if turns is not None]
        texts = Texts(self.tokenizer)  # the dialogues up to rewritten answers have been rendered already
        while waiting:
            encoded = encode_dialogues(texts, [turns for _, turns, _ in waiting], self.template, self.max_tokens)
            again = []
            for (i, whole, last_only), (turns, ids, mask, rewritten) in zip(waiting, encoded, strict=True):
                source = records[i].source
                if ids is None:
                    tally.add(f"dropped: the last exchange alone exceeds {self.flag}", source)
                    continue
                if len(turns) < len(whole):
                    tally.add(f"truncated (oldest turns dropped) to {self.flag}", source)
                if last_only:
                    start = last_answer(mask).start
                    mask, rewritten = [False] * start + mask[start:], []
                rows[i].append({"ids": ids, "borders": _borders(mask), "source": source})
                for k in rewritten:
                    reason = "earlier answers that the template rewrites, each used as a sample of its own"
                    tally.add(reason, source)
                    again.append((i, turns[: k + 1], True))
            waiting = again
        return rows

    @property
    def limit(self) -> str:
        """The flag that limits the tokens, and its value."""
        return f"{self.flag} {self.max_tokens}"

    def item(self, row: dict) -> EncodedDialogue:
        """Returns the dialogue of a row."""
        mask = []
        for k, (start, stop) in enumerate(pairwise([0, *row["borders"], len(row["ids"])])):
            mask += [bool(k % 2)] * (stop - start)
        return EncodedDialogue(row["ids"], mask, row["source"])


def _borders(mask: list[bool]) -> list[int]:
    """Returns the places at which the mask changes; before the first it is False."""
    return [i for i, (before, now) in enumerate(pairwise([False, *mask])) if before != now]
