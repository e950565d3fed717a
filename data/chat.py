"""Dialogues in the tokenizer's own chat template: prompt, answers and the end of a turn, found by rendering."""

import json
from dataclasses import dataclass
from functools import lru_cache

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from utils.errors import UserError

Turns = list[dict[str, str]]
_ANSWER = "7391"  # of the probe dialogue: no template contains it, and upper- or lower-casing does not change it


@dataclass(frozen=True)
class TurnEnd:
    """How a template ends the assistant's turn.

    ids: what it writes behind an answer, before anything else; stop: the id in `ids` that ends the turn.
    """

    ids: tuple[int, ...]
    stop: int

    @property
    def learnt(self) -> int:
        """How many of `ids` a model has to generate: those up to `stop`, which is included."""
        return self.ids.index(self.stop) + 1


def turn_end(tokenizer: PreTrainedTokenizerBase, template: str | None) -> TurnEnd:
    """The end of the assistant's turns in `template`: EOS alone unless that is `chat`."""
    if template != "chat":
        return TurnEnd((tokenizer.eos_token_id,), tokenizer.eos_token_id)
    return _probed_end(tokenizer, str(tokenizer.chat_template), json.dumps(template_arguments(tokenizer)))


@lru_cache(maxsize=8)
def _probed_end(tokenizer: PreTrainedTokenizerBase, _template: str, _given: str) -> TurnEnd:
    """What stands behind a probe's answer both at the end of a dialogue and before another question.

    Some templates write more at the end alone (Phi 3: EOS), which no answer in the history has. Without a special token
    in it, a turn has no end of its own, and answers end in EOS. The last two parameters are for the cache.
    """
    turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _ANSWER}]
    last = _ids_behind_answer(tokenizer, turns)
    earlier = _ids_behind_answer(tokenizer, [*turns, {"role": "user", "content": "Question"}])
    common = next((k for k, (a, b) in enumerate(zip(last, earlier)) if a != b), min(len(last), len(earlier)))
    added = tokenizer.added_tokens_decoder.items()
    ends = {tokenizer.eos_token_id, *(i for i, token in added if token.content.strip())}
    stop = next((i for i in last[:common] if i in ends), None)
    if stop is None:
        return TurnEnd((tokenizer.eos_token_id,), tokenizer.eos_token_id)
    return TurnEnd(tuple(last[:common]), stop)


def _ids_behind_answer(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> list[int]:
    before, found, behind = render(tokenizer, turns, open_answer=False).partition(_ANSWER)
    start, whole = (_encode(tokenizer, text) for text in (before + found, before + found + behind))
    return whole[len(start) :] if found and whole[: len(start)] == start else []


def render(tokenizer: PreTrainedTokenizerBase, turns: Turns, open_answer: bool) -> str:
    """The dialogue as the template writes it. Raises UserError for one that the template refuses."""
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=open_answer, **template_arguments(tokenizer)
        )
    except (TemplateError, TypeError, ValueError) as error:  # some templates refuse system turns
        given = ", or --chat_template_kwargs are not what it takes" if template_arguments(tokenizer) else ""
        raise UserError(f"--template chat: the tokenizer's chat template refuses a dialogue: {error}{given}") from error


def encode_chat(tokenizer: PreTrainedTokenizerBase, turns: Turns, open_answer: bool = True) -> list[int]:
    """Ids of the rendered dialogue; open_answer: with what begins the assistant's next answer."""
    return _encode(tokenizer, render(tokenizer, turns, open_answer))


def closed_answer(tokenizer: PreTrainedTokenizerBase, turns: Turns, prompt: list[int]) -> list[int]:
    """Ids of the last turn as the template writes it behind `prompt`, and the end of the turn.

    What the template puts in front of the text (an empty stretch of reasoning) belongs to the answer. Where the
    template or a merge across the border changes the text or the prompt, the text is encoded on its own.
    """
    end, text = turn_end(tokenizer, "chat"), turns[-1]["content"]
    whole = encode_chat(tokenizer, turns, open_answer=False)
    ids = whole[len(prompt) :]
    if end.stop in ids:
        ids = ids[: len(ids) - ids[::-1].index(end.stop) - end.learnt]
    same_prompt, same_text = whole[: len(prompt)] == prompt, tokenizer.decode(ids).strip().endswith(text.strip())
    if not same_prompt or not same_text or end.stop in ids:  # the last: an end spelt out in the text
        text = _without_opened(tokenizer, text, prompt)
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return [*ids, *end.ids]


def _without_opened(tokenizer: PreTrainedTokenizerBase, text: str, prompt: list[int]) -> str:
    """The text less a tag in front that stands at the end of the prompt already, as DeepSeek-R1's <think> does."""
    before = tokenizer.decode(prompt).rstrip()
    tags = (token.content for token in tokenizer.added_tokens_decoder.values())
    opened = next((tag for tag in tags if tag and before.endswith(tag) and text.startswith(tag)), None)
    return text.removeprefix(opened).lstrip() if opened else text


def earlier_answers(tokenizer: PreTrainedTokenizerBase, turns: Turns, ids: list[int]) -> tuple[list[bool], list[int]]:
    """(mask of the answers within the prompt `ids` of `turns`, places of the turns whose answers are not in it).

    An answer is there if the prompt goes through it as a dialogue that ends in it does. Templates that take reasoning
    out of the history, say, write it in another way.
    """
    end, mask, changed = turn_end(tokenizer, "chat"), [False] * len(ids), []
    for k, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        start = encode_chat(tokenizer, turns[:k])
        own = start + closed_answer(tokenizer, turns[: k + 1], start)
        if ids[: len(own)] != own:
            changed.append(k)
            continue
        stop = len(own) - len(end.ids) + end.learnt
        mask[len(start) : stop] = [True] * (stop - len(start))
    return mask, changed


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of rendered text, whose special tokens are tokens; the template writes the BOS."""
    return tokenizer.encode(text, add_special_tokens=False)


def template_arguments(tokenizer: PreTrainedTokenizerBase) -> dict:
    """--chat_template_kwargs, as `load_tokenizer` got them."""
    return getattr(tokenizer, "chat_template_kwargs", {})
