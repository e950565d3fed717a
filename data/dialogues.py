"""Load and encode dialogues for SFT and for the pre-training (ptx) loss, which train on the assistant's answers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from data.encode import encode_dialogues as encode_turns
from data.formats.dialogue_forms import parse_turns
from data.formats.records import FLAG, BadRecord, Record, Tally, load_items
from data.formats.truncate import encode_fitting
from data.order import mixture, order
from data.template import Turns, last_answer
from utils.errors import Say


@dataclass(frozen=True)
class Dialogue:
    """Turns that end in an answer, and the place of the record. last_answer_only: train on the last answer only."""

    turns: Turns
    source: str
    last_answer_only: bool = False


@dataclass(frozen=True)
class EncodedDialogue:
    """Token ids of a dialogue, a mask of the tokens to train on (the answers), and the place of the record."""

    ids: list[int]
    answer_mask: list[bool]
    source: str = ""


def load_dialogues(
    path: str, num_valid: int, seed: int, say: Say = print, flag: str = FLAG, lower: bool = False
) -> tuple[list[Dialogue], list[Dialogue]]:
    """Returns (train, valid) dialogues from data in any format of data/formats/dialogue_forms.py.

    A last question without an answer is removed; malformed records and those without an answer are dropped and counted.
    Raises UserError if the data cannot be read or nothing is left. flag: the flag that gave the path.
    """
    return load_items(path, "dialogues", _dialogue_of, num_valid, seed, say, flag, lower)


def _dialogue_of(record: Record, tally: Tally) -> Dialogue:
    turns = parse_turns(record.value)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRecord("no answer of the assistant")
    if turns[-1]["role"] == "user":
        turns = turns[:-1]
        tally.add("ended in a question without an answer, which was cut off", record.source)
    return Dialogue(turns, record.source)


def encode(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, template: str, max_tokens: int
) -> tuple[EncodedDialogue | None, int, list[Dialogue]]:
    """Returns (encoding, number of turns removed, for each earlier answer that the template rewrites the dialogue up
    to it). The oldest turns go until the dialogue fits; the encoding is None if the last ones do not fit.
    """
    ((turns, ids, mask, rewritten),) = encode_turns(tokenizer, [dialogue.turns], template, max_tokens)
    if ids is None:
        return None, 0, []
    if dialogue.last_answer_only:
        start = last_answer(mask).start
        mask, rewritten = [False] * start + mask[start:], []
    parts = [replace(dialogue, turns=turns[: k + 1], last_answer_only=True) for k in rewritten]
    return EncodedDialogue(ids, mask, dialogue.source), len(dialogue.turns) - len(turns), parts


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase, dialogues: list[Dialogue], template: str, max_tokens: int,
    say: Say, flag: str = "--context_truncate",
) -> list[EncodedDialogue]:  # fmt: skip
    """Returns the encodings of all dialogues that fit `max_tokens`; reports how many were truncated and dropped.

    An earlier answer that the template rewrites in the history becomes an additional sample that ends in it and trains
    on it only; these follow all others. flag: the flag that gave the limit.
    """
    parts: list[Dialogue] = []

    def fit(dialogue: Dialogue) -> tuple[EncodedDialogue | None, int]:
        encoded, removed, rewritten = encode(tokenizer, dialogue, template, max_tokens)
        parts.extend(rewritten)
        return encoded, removed

    kept = encode_fitting(dialogues, fit, "dialogues", say, flag)
    if not parts:
        return kept
    tally = Tally("dialogues")
    for part in parts:
        tally.add("earlier answers that the template rewrites, each used as a sample of its own", part.source)
    tally.report(say)
    return kept + encode_fitting(list(parts), fit, "earlier answers", say, flag)


def batches(
    sets: list[list[EncodedDialogue]], size: int, seed: int, weights: list[float] | None = None
) -> Iterator[list[EncodedDialogue]]:
    """Yields batches in seeded order without end, the same on all ranks. weights: share per set; None: sets are one."""
    merged = [dialogue for items in sets for dialogue in items]
    start = 0
    while True:
        if weights is None:
            yield [merged[i] for i in order(start, size, len(merged), seed)]
        else:
            yield [sets[k][i] for k, i in mixture(start, size, [len(items) for items in sets], weights, seed)]
        start += size
