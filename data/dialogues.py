"""Dialogues for SFT and for the pre-training (ptx) loss: the assistant's answers are what is learnt."""

from collections.abc import Callable
from dataclasses import dataclass

from data.records import BadRecord, Record, Tally, load_items
from data.template import Turns
from data.turns import turns_of


@dataclass(frozen=True)
class Dialogue:
    """Turns that end in the assistant's, and where the record stands."""

    turns: Turns
    source: str


def load_dialogues(
    path: str, num_valid: int, seed: int, say: Callable[[str], None] = print
) -> tuple[list[Dialogue], list[Dialogue]]:
    """(train, valid) dialogues of `path` in any form of data/turns.py.

    A last question without an answer is cut off; a record with no answer at all, or malformed, is dropped. Both are
    counted and said. Raises UserError when the data cannot be read or nothing is left.
    """
    return load_items(path, "dialogues", _dialogue_of, num_valid, seed, say)


def _dialogue_of(record: Record, tally: Tally) -> Dialogue:
    turns = turns_of(record.value)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRecord("no answer of the assistant in it")
    if turns[-1]["role"] == "user":
        turns = turns[:-1]
        tally.add("ended in a question without an answer, which was cut off", record.source)
    return Dialogue(turns, record.source)
