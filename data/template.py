"""Encode dialogues to token ids and decode answers; shared by prompts, reward models, SFT and generation.

moss_en   <s>Human:question</s>Assistant:answer</s>Human:…
moss_zh   <s><|Human|>question</s><|MOSS|>answer</s><|Human|>…
chat      the tokenizer's own chat template: data/chat.py

In the moss templates, each stretch between special tokens is encoded separately, with SentencePiece's dummy prefix.
Special tokens written out in a text stay text; in the history of a chat template they become tokens. The moss models
have no system role: a system turn is put before the first question, with an empty line in between.
"""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from data.chat import encode_last_answer, mask_earlier_answers, turn_end
from data.texts import Texts, Turns
from utils.tokenizer import MOSS_ZH_TAGS, stop_ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase | Texts, turns: Turns, template: str) -> list[int]:
    """Returns the ids of everything before the answer. turns: [{"role", "content"}, …], the last one is the human's."""
    texts = Texts.of(tokenizer)
    return texts.chat(turns, open_answer=True) if template == "chat" else _encode_moss(texts, turns, template)[0]


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str) -> tuple[list[int], list[bool]]:
    """Returns (ids, mask) of a dialogue that ends in an answer; the mask is True at answer tokens and their end tokens.

    The ids begin with exactly `encode_prompt(turns[:-1])`; what the template writes after the end token is not in the
    mask.
    """
    texts = Texts(tokenizer)
    prompt, answer, trained = encode_answered(texts, turns, template)
    mask, _ = mask_prompt(texts, turns[:-1], template, prompt)
    return prompt + answer, mask + [True] * trained + [False] * (len(answer) - trained)


def mask_prompt(texts: Texts, turns: Turns, template: str, ids: list[int]) -> tuple[list[bool], list[int]]:
    """Returns (mask of the earlier answers in the prompt `ids` of `turns`, indices of turns whose answers the template
    rewrites, so that the mask lacks them).
    """
    if template == "chat":
        return mask_earlier_answers(texts, turns, ids)
    return _encode_moss(texts, turns, template)[1], []


def encode_answered(
    tokenizer: PreTrainedTokenizerBase | Texts, turns: Turns, template: str
) -> tuple[list[int], list[int], int]:
    """Returns (ids before the last answer, ids of it and of what the template writes behind it, number of the latter
    ids up to the end token).
    """
    texts = Texts.of(tokenizer)
    prompt, end = encode_prompt(texts, turns[:-1], template), turn_end(texts.tokenizer, template)
    if template == "chat":
        answer = encode_last_answer(texts, turns, prompt)
    else:
        answer = [*_continue(texts, turns[-1]["content"], template), *end.ids]
    return prompt, answer, len(answer) - len(end.ids) + end.num_generated


def prepare(texts: Texts, dialogues: Iterable[Turns], template: str) -> None:
    """Encodes what `encode_prompt` of dialogues that end in a question and `encode_answered` of the others will need.

    It is a matter of speed: many texts in one call.
    """
    if template == "chat":
        ends = [(turns, turns[-1]["role"] != "assistant") for turns in dialogues]
        prompts = [(turns[:-1], True) for turns, is_prompt in ends if not is_prompt]
        texts.encode_chats(ends + prompts)
    else:
        texts.encode_plain(_stretch(turn, template) for turns in dialogues for turn in _fold_system(turns))


def last_answer(mask: list[bool]) -> slice:
    """Returns the slice of the last answer, with its end token, from a mask of `encode_dialogue`."""
    stop = len(mask) - mask[::-1].index(True)
    return slice(stop - mask[:stop][::-1].index(False), stop)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a text that is not a dialogue: BOS, if the tokenizer has one, the text and EOS."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*bos, *Texts(tokenizer).plain(text), tokenizer.eos_token_id]


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Returns the text of response ids without special tokens, stop ids, and ids of a padded embedding."""
    ends = stop_ids(tokenizer)
    known = [i for i in ids if i < len(tokenizer) and i not in ends]
    return tokenizer.decode(known, skip_special_tokens=True).strip()


def _encode_moss(texts: Texts, turns: Turns, template: str) -> tuple[list[int], list[bool]]:
    """Returns (ids, mask) of the turns and the opening of the assistant's next answer."""
    tokenizer = texts.tokenizer
    eos = [tokenizer.eos_token_id]
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    mask = [False] * len(ids)
    human, opening = _human(texts, template), _opening(texts, template)
    for turn in _fold_system(turns):
        if turn["role"] == "user":
            piece, answer = human + texts.plain(_stretch(turn, template)) + eos, []
        else:
            piece, answer = opening, _continue(texts, turn["content"], template) + eos
        ids += piece + answer
        mask += [False] * len(piece) + [True] * len(answer)
    return ids + opening, mask + [False] * len(opening)


def _fold_system(turns: Turns) -> Turns:
    if turns[0]["role"] != "system":
        return turns
    first = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return [first, *turns[2:]]


def _stretch(turn: dict[str, str], template: str) -> str:
    """Returns the text of a turn that is encoded in one."""
    if template == "moss_en":
        return ("Human:" if turn["role"] == "user" else "Assistant:") + turn["content"]
    return turn["content"]


def _human(texts: Texts, template: str) -> list[int]:
    return [] if template == "moss_en" else [texts.tokenizer.convert_tokens_to_ids(MOSS_ZH_TAGS[0])]


def _opening(texts: Texts, template: str) -> list[int]:
    if template == "moss_en":
        return texts.plain("Assistant:")
    return [texts.tokenizer.convert_tokens_to_ids(MOSS_ZH_TAGS[1])]


def _continue(texts: Texts, text: str, template: str) -> list[int]:
    """Returns the ids of an answer, which starts a stretch after `<|MOSS|>` and continues one after `Assistant:`.

    A token can contain the colon and the start of the answer (":)"), but generation starts after the colon, so the
    answer is encoded after a text that it does not merge with; if there is none, as its own stretch.
    """
    if template == "moss_en":
        for before in ("Assistant:", "\n", "Assistant"):
            start, whole = texts.plain(before), texts.plain(before + text)
            if whole[: len(start)] == start:
                return whole[len(start) :]
    return texts.plain(text)
