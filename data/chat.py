"""Encode dialogues with the tokenizer's own chat template; answers and ends of turns are located by rendering."""

import json
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from data.texts import Texts, Turns, render, template_arguments
from utils.errors import UserError
from utils.tokenizer import encode_texts

MANY_TURNS = 32  # from here on, the prefixes of a dialogue are not rendered whole
# The texts of the probe dialogue: they are in no template, and templates that change case keep them.
_QUESTION, _ANSWER = "2648", "7391"


@dataclass(frozen=True)
class TurnEnd:
    """The end of the assistant's turn. ids: what the template writes after an answer; stop: the one that ends it."""

    ids: tuple[int, ...]
    stop: int

    @property
    def num_generated(self) -> int:
        """Number of `ids` that a model generates: up to and including `stop`."""
        return self.ids.index(self.stop) + 1


def turn_end(tokenizer: PreTrainedTokenizerBase, template: str | None) -> TurnEnd:
    """Returns the end of the assistant's turns in `template`; it is EOS except for `chat`."""
    if template != "chat":
        return TurnEnd((tokenizer.eos_token_id,), tokenizer.eos_token_id)
    return _probed_end(tokenizer, str(tokenizer.chat_template), json.dumps(template_arguments(tokenizer)))


@lru_cache(maxsize=8)
def _probed_end(tokenizer: PreTrainedTokenizerBase, _template: str, _given: str) -> TurnEnd:
    """Returns the ids after an answer that are the same at the end of a dialogue and before another question.

    Some templates write more at the end of a dialogue (Phi 3: EOS). Without a special token among these ids, the turn
    has no end token and answers end in EOS. The last two parameters are only keys of the cache.
    """
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    if _QUESTION not in render(tokenizer, turns[:1], open_answer=True):
        raise UserError(
            "--template chat: the tokenizer's chat template leaves out the question; use another --template"
        )
    if _ANSWER not in render(tokenizer, turns, open_answer=False):
        raise UserError("--template chat: the tokenizer's chat template leaves out answers; use another --template")
    last = _ids_after_answer(tokenizer, turns)
    earlier = _ids_after_answer(tokenizer, [*turns, turns[0]])
    common = _num_common(last, earlier)
    added = tokenizer.added_tokens_decoder.items()
    ends = {tokenizer.eos_token_id, *(i for i, token in added if token.content.strip())}
    stop = next((i for i in last[:common] if i in ends), None)
    if stop is None:
        return TurnEnd((tokenizer.eos_token_id,), tokenizer.eos_token_id)
    return TurnEnd(tuple(last[:common]), stop)


def _ids_after_answer(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> list[int]:
    before, found, after = render(tokenizer, turns, open_answer=False).partition(_ANSWER)
    start, whole = encode_texts(tokenizer, [before + found, before + found + after], False)
    return whole[len(start) :] if found and whole[: len(start)] == start else []


def encode_last_answer(texts: Texts, turns: Turns, prompt: list[int]) -> list[int]:
    """Returns the ids of the last answer as the template writes it after `prompt`, and of the end of its turn.

    Text that the template puts before the answer, such as an empty block of reasoning, belongs to it. If the template
    or the tokenizer changes the answer or the prompt when they are joined, the answer is encoded separately.
    """
    tokenizer, text = texts.tokenizer, turns[-1]["content"]
    end, whole = turn_end(tokenizer, "chat"), texts.chat(turns, open_answer=False)
    ids = whole[len(prompt) :]
    if end.stop in ids:
        ids = ids[: len(ids) - ids[::-1].index(end.stop) - end.num_generated]
    same_prompt, same_text = whole[: len(prompt)] == prompt, tokenizer.decode(ids).strip().endswith(text.strip())
    if not same_prompt or not same_text or end.stop in ids:  # the text can contain the end token written out
        ids = texts.plain(_without_opened_tag(tokenizer, text, prompt))
    return [*ids, *end.ids]


def _without_opened_tag(tokenizer: PreTrainedTokenizerBase, text: str, prompt: list[int]) -> str:
    """Returns the text without a leading tag that already ends the prompt, such as DeepSeek-R1's <think>."""
    before = tokenizer.decode(prompt).rstrip()
    tags = (token.content for token in tokenizer.added_tokens_decoder.values())
    opened = next((tag for tag in tags if tag and before.endswith(tag) and text.startswith(tag)), None)
    return text.removeprefix(opened).lstrip() if opened else text


def mask_earlier_answers(texts: Texts, turns: Turns, ids: list[int]) -> tuple[list[bool], list[int]]:
    """Returns (mask of the answers in the prompt `ids` of `turns`, indices of turns whose answers were rewritten).

    An answer is in place if the prompt begins with the dialogue up to it. In a long dialogue, where this would take
    quadratic time, each answer is rendered with only the exchange before it, and searched for in the prompt.
    """
    end, mask, rewritten = turn_end(texts.tokenizer, "chat"), [False] * len(ids), []
    system, text, place = turns[: turns[0]["role"] == "system"], _searchable(ids), 0
    for k, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        since = k - 3 if len(turns) > MANY_TURNS else 0
        before = system + turns[since:k] if since > len(system) else turns[:k]
        start = texts.chat(before, open_answer=True)
        own = start + encode_last_answer(texts, [*before, turn], start)
        if len(before) < k:
            head = len(texts.chat([*system, turns[since]], open_answer=True))
            found = text.find(_searchable(own[head:]), place)
        else:
            head, found = 0, 0 if ids[: len(own)] == own else -1
        if found < 0:
            rewritten.append(k)
            continue
        place = found - head + len(start)
        stop = found - head + len(own) - len(end.ids) + end.num_generated
        mask[place:stop] = [True] * (stop - place)
    return mask, rewritten


def _searchable(ids: list[int]) -> str:
    """Returns one character per id."""
    return "".join(map(chr, ids))


def _num_common(first: list[int], second: list[int]) -> int:
    """Returns the number of ids with which both lists begin."""
    return next((k for k, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
