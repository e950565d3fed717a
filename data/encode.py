"""Encode batches of prompts, dialogues and answers within a token limit: the oldest exchanges go until they fit."""

from transformers import PreTrainedTokenizerBase

from data.formats.truncate import newest_turns
from data.template import Turns, encode_answered, encode_dialogue_parts, encode_prompt

Answer = tuple[list[int], list[int], int]  # as of `encode_answered`


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, dialogues: list[Turns], template: str, max_tokens: int
) -> list[tuple[Turns, list[int] | None]]:
    """Returns per dialogue, which ends in a question, (turns left, ids; None if the last question is too long)."""

    def fit(turns: Turns) -> list[int] | None:
        ids = encode_prompt(tokenizer, turns, template)
        return ids if len(ids) <= max_tokens else None

    return [newest_turns(turns, fit, max_tokens) for turns in dialogues]


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase, dialogues: list[Turns], template: str, max_tokens: int
) -> list[tuple[Turns, list[int] | None, list[bool], list[int]]]:
    """Returns per dialogue, which ends in an answer, (turns left, ids; None if the last exchange is too long, mask of
    the answers, indices of turns whose answers the template rewrites). The ids end with the last end token.
    """

    def fit(turns: Turns) -> int | None:
        prompt, _, trained = encode_answered(tokenizer, turns, template)
        length = len(prompt) + trained  # the ids after the last end token are not trained on
        return length if length <= max_tokens else None

    found = []
    for dialogue in dialogues:
        turns, length = newest_turns(dialogue, fit, max_tokens)
        if length is None:
            found.append((turns, None, [], []))
            continue
        ids, mask, rewritten = encode_dialogue_parts(tokenizer, turns, template)
        found.append((turns, ids[:length], mask[:length], rewritten))
    return found


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, items: list[tuple[Turns, list[str]]], template: str, max_tokens: int
) -> list[tuple[Turns, list[Answer] | None]]:
    """Returns per (history, answers) the history left, the same for all its answers, and the encoding of each answer as
    of `encode_answered`; None if the last question with the longest answer is too long.
    """

    def fit(history: Turns, answers: list[str]) -> list[Answer] | None:
        whole = ([*history, {"role": "assistant", "content": answer}] for answer in answers)
        sides = [encode_answered(tokenizer, turns, template) for turns in whole]
        return sides if max(len(prompt) + len(answer) for prompt, answer, _ in sides) <= max_tokens else None

    return [
        newest_turns(history, lambda turns, answers=answers: fit(turns, answers), max_tokens)
        for history, answers in items
    ]
