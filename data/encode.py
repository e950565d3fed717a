"""Encode batches of prompts, dialogues and answers within a token limit: the oldest exchanges go until they fit.

The functions of data/template.py encode a dialogue; here, what they need of a batch is encoded beforehand, in one call.
A Texts instead of the tokenizer knows the texts of earlier batches, such as those of dialogues that are cut off at an
earlier answer.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from data.chat import MANY_TURNS
from data.formats.truncate import newest_of_batch
from data.template import encode_answered, encode_prompt, mask_prompt, prepare
from data.texts import Texts, Turns

Answer = tuple[list[int], list[int], int]  # as of `encode_answered`


@contextmanager
def _uncollected() -> Iterator[None]:
    """Switches the garbage collector off: a batch makes many lists, and collections take a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase | Texts, dialogues: list[Turns], template: str, max_tokens: int
) -> list[tuple[Turns, list[int] | None]]:
    """Returns per dialogue, which ends in a question, (turns left, ids; None if the last question is too long)."""
    texts = Texts.of(tokenizer)

    def fit(_: int, turns: Turns) -> list[int] | None:
        ids = encode_prompt(texts, turns, template)
        return ids if len(ids) <= max_tokens else None

    return newest_of_batch(dialogues, fit, max_tokens, lambda wanted: prepare(texts, wanted.values(), template))


@_uncollected()
def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase | Texts, dialogues: list[Turns], template: str, max_tokens: int
) -> list[tuple[Turns, list[int] | None, list[bool], list[int]]]:
    """Returns per dialogue, which ends in an answer, (turns left, ids; None if the last exchange is too long, mask of
    the answers, indices of turns whose answers the template rewrites). The ids end with the last end token.
    """
    texts = Texts.of(tokenizer)

    def fit(_: int, turns: Turns) -> tuple[list[int], list[int]] | None:
        prompt, answer, trained = encode_answered(texts, turns, template)
        # The ids after the last end token are not trained on.
        return (prompt, answer[:trained]) if len(prompt) + trained <= max_tokens else None

    kept = newest_of_batch(dialogues, fit, max_tokens, lambda wanted: prepare(texts, wanted.values(), template))
    if template == "chat":  # `mask_prompt` compares the prompt with the dialogue up to each answer
        short = [turns for turns, ids in kept if ids and len(turns) <= MANY_TURNS]
        ends = [turns[:k] for turns in short for k in range(1, len(turns)) if turns[k - 1]["role"] == "assistant"]
        prepare(texts, ends, template)
    found = []
    for turns, ids in kept:
        mask, rewritten = mask_prompt(texts, turns[:-1], template, ids[0]) if ids else ([], [])
        whole = (ids[0] + ids[1], mask + [True] * len(ids[1])) if ids else (None, [])
        found.append((turns, *whole, rewritten))
    return found


@_uncollected()
def encode_answers(
    tokenizer: PreTrainedTokenizerBase | Texts, items: list[tuple[Turns, list[str]]], template: str, max_tokens: int
) -> list[tuple[Turns, list[Answer] | None]]:
    """Returns per (history, answers) the history left, the same for all its answers, and the encoding of each answer as
    of `encode_answered`; None if the last question with the longest answer is too long.
    """
    texts, histories = Texts.of(tokenizer), [history for history, _ in items]

    def answered(k: int, history: Turns) -> list[Turns]:
        return [[*history, {"role": "assistant", "content": answer}] for answer in items[k][1]]

    def fit(k: int, history: Turns) -> list[Answer] | None:
        sides = [encode_answered(texts, turns, template) for turns in answered(k, history)]
        return sides if max(len(prompt) + len(answer) for prompt, answer, _ in sides) <= max_tokens else None

    def prepare_answers(wanted: dict[int, Turns]) -> None:
        prepare(texts, [turns for k, history in wanted.items() for turns in answered(k, history)], template)

    return newest_of_batch(histories, fit, max_tokens, prepare_answers)
