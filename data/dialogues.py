"""Dialogues for SFT and for the pre-training (ptx) loss: the assistant's answers are what is learnt."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from data.formats.dialogue_forms import turns_of
from data.formats.records import FLAG, BadRecord, Record, Tally, load_items
from data.formats.truncate import encode_fitting
from data.order import mixture, order
from data.prompts import without_oldest
from data.template import Turns, encode_answers, last_answer


@dataclass(frozen=True)
class Dialogue:
    """Turns that end in the assistant's, and where the record stands; last_answer_only: earlier ones are not learnt."""

    turns: Turns
    source: str
    last_answer_only: bool = False


@dataclass(frozen=True)
class EncodedDialogue:
    """Ids of a dialogue, and which of them are learnt: the assistant's. `source` is where the record stands."""

    ids: list[int]
    answer_mask: list[bool]
    source: str = ""


def load_dialogues(
    path: str, num_valid: int, seed: int, say: Callable[[str], None] = print, flag: str = FLAG, lower: bool = False
) -> tuple[list[Dialogue], list[Dialogue]]:
    """(train, valid) dialogues of `path`, which `flag` gave, in any form of data/formats/dialogue_forms.py.

    A last question without an answer is cut off; a record with no answer at all, or malformed, is dropped. Both are
    counted and said. Raises UserError when the data cannot be read or nothing is left.
    """
    return load_items(path, "dialogues", _dialogue_of, num_valid, seed, say, flag, lower)


def _dialogue_of(record: Record, tally: Tally) -> Dialogue:
    turns = turns_of(record.value)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRecord("no answer of the assistant in it")
    if turns[-1]["role"] == "user":
        turns = turns[:-1]
        tally.add("ended in a question without an answer, which was cut off", record.source)
    return Dialogue(turns, record.source)


def encode(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, template: str, max_tokens: int
) -> tuple[EncodedDialogue | None, int]:
    """(the dialogue as ids, how many turns were left out): the oldest go until it fits; None when the last do not."""
    return _encode(tokenizer, dialogue, template, max_tokens)[:2]


def _encode(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, template: str, max_tokens: int
) -> tuple[EncodedDialogue | None, int, list[Dialogue]]:
    """`encode`, and for each earlier answer that it cannot teach, as the template changes it, the dialogue up to it."""
    turns = dialogue.turns
    while turns:
        ids, mask, changed = encode_answers(tokenizer, turns, template)
        answer = last_answer(mask)
        if answer.stop <= max_tokens:  # nothing is learnt from what follows the last answer's end token
            if dialogue.last_answer_only:
                mask = [False] * answer.start + mask[answer.start :]
            encoded = EncodedDialogue(ids[: answer.stop], mask[: answer.stop], dialogue.source)
            parts = [replace(dialogue, turns=turns[: k + 1], last_answer_only=True) for k in changed]
            return encoded, len(dialogue.turns) - len(turns), [] if dialogue.last_answer_only else parts
        turns = without_oldest(turns)
    return None, 0, []


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase, dialogues: list[Dialogue], template: str, max_tokens: int,
    say: Callable[[str], None], flag: str = "--context_truncate",
) -> list[EncodedDialogue]:  # fmt: skip
    """All that fit into the `max_tokens` of `flag`; what was cut and what was dropped is counted and said.

    Earlier answers that the template renders in another way once they are history, such as those whose reasoning it
    removes, are samples of their own, which end in them and teach nothing else. They stand behind all others.
    """
    parts: list[Dialogue] = []

    def fit(dialogue: Dialogue) -> tuple[EncodedDialogue | None, int]:
        encoded, cut, changed = _encode(tokenizer, dialogue, template, max_tokens)
        parts.extend(changed)
        return encoded, cut

    kept = encode_fitting(dialogues, fit, "dialogues", say, flag)
    if not parts:
        return kept
    tally = Tally("dialogues")
    for part in parts:
        tally.add("earlier answers that the template changes in the history, each a sample of its own", part.source)
    for line in tally.lines():
        say(line)
    return kept + encode_fitting(list(parts), fit, "earlier answers", say, flag)


def batches(
    sets: list[list[EncodedDialogue]], size: int, seed: int, weights: list[float] | None = None
) -> Iterator[list[EncodedDialogue]]:
    """Endless batches in seeded order, the same on every rank. With weights, each set has that share of the samples.

    Each set is run through epoch by epoch; without weights all of them together are one set.
    """
    merged = [dialogue for items in sets for dialogue in items]
    start = 0
    while True:
        if weights is None:
            yield [merged[i] for i in order(start, size, len(merged), seed)]
        else:
            places = mixture(start, size, [len(items) for items in sets], weights, seed)
            yield [sets[k][i] for k, i in places]
        start += size
