"""Encode dialogues to token ids and decode answers; shared by prompts, reward models, SFT and generation.

moss_en   <s>Human:question</s>Assistant:answer</s>Human:…
moss_zh   <s><|Human|>question</s><|MOSS|>answer</s><|Human|>…
chat      the tokenizer's own chat template: data/chat.py

In the moss templates, each stretch between special tokens is encoded separately, with SentencePiece's dummy prefix.
Special tokens written out in a text stay text; in the history of a chat template they become tokens. The moss models
have no system role: a system turn is put before the first question, with an empty line in between.
"""

from transformers import PreTrainedTokenizerBase

from data.chat import Turns, encode_chat, encode_last_answer, mask_earlier_answers, turn_end
from utils.tokenizer import MOSS_ZH_TAGS, stop_ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str) -> list[int]:
    """Returns the ids of everything before the answer. turns: [{"role", "content"}, …], the last one is the human's."""
    if template == "chat":
        return encode_chat(tokenizer, turns)
    return _encode_moss(tokenizer, turns, template)[0]


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str) -> tuple[list[int], list[bool]]:
    """Returns (ids, mask) of a dialogue that ends in an answer; the mask is True at answer tokens and their end tokens.

    The ids begin with exactly `encode_prompt(turns[:-1])`; what the template writes after the end token is not in the
    mask.
    """
    ids, mask, _ = encode_dialogue_parts(tokenizer, turns, template)
    return ids, mask


def encode_dialogue_parts(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str
) -> tuple[list[int], list[bool], list[int]]:
    """`encode_dialogue`, and the indices of turns whose answers the template rewrites, so that the mask lacks them."""
    prompt, answer, trained = encode_answered(tokenizer, turns, template)
    if template == "chat":
        mask, rewritten = mask_earlier_answers(tokenizer, turns[:-1], prompt)
    else:
        mask, rewritten = _encode_moss(tokenizer, turns[:-1], template)[1], []
    return prompt + answer, mask + [True] * trained + [False] * (len(answer) - trained), rewritten


def encode_answered(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str
) -> tuple[list[int], list[int], int]:  # fmt: skip
    """Returns (ids before the last answer, ids of it and of what the template writes behind it, number of the latter
    ids up to the end token).
    """
    prompt, end = encode_prompt(tokenizer, turns[:-1], template), turn_end(tokenizer, template)
    if template == "chat":
        answer = encode_last_answer(tokenizer, turns, prompt)
    else:
        answer = [*_continue(tokenizer, turns[-1]["content"], template), *end.ids]
    return prompt, answer, len(answer) - len(end.ids) + end.num_generated


def last_answer(mask: list[bool]) -> slice:
    """Returns the slice of the last answer, with its end token, from a mask of `encode_dialogue`."""
    stop = len(mask) - mask[::-1].index(True)
    return slice(stop - mask[:stop][::-1].index(False), stop)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a text that is not a dialogue: BOS, if the tokenizer has one, the text and EOS."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*bos, *_encode(tokenizer, text), tokenizer.eos_token_id]


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Returns the text of response ids without special tokens, stop ids, and ids of a padded embedding."""
    ends = stop_ids(tokenizer)
    known = [i for i in ids if i < len(tokenizer) and i not in ends]
    return tokenizer.decode(known, skip_special_tokens=True).strip()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a stretch of plain text; special tokens written out in it stay text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _encode_moss(tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str) -> tuple[list[int], list[bool]]:
    """Returns (ids, mask) of the turns and the opening of the assistant's next answer."""
    eos = [tokenizer.eos_token_id]
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    mask = [False] * len(ids)
    opening = _opening(tokenizer, template)
    for turn in _fold_system(turns):
        if turn["role"] == "user":
            piece, answer = _human(tokenizer, turn["content"], template) + eos, []
        else:
            piece, answer = opening, _continue(tokenizer, turn["content"], template) + eos
        ids += piece + answer
        mask += [False] * len(piece) + [True] * len(answer)
    return ids + opening, mask + [False] * len(opening)


def _fold_system(turns: Turns) -> Turns:
    if turns[0]["role"] != "system":
        return turns
    first = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
    return [first, *turns[2:]]


def _human(tokenizer: PreTrainedTokenizerBase, text: str, template: str) -> list[int]:
    if template == "moss_en":
        return _encode(tokenizer, f"Human:{text}")
    return [tokenizer.convert_tokens_to_ids(MOSS_ZH_TAGS[0]), *_encode(tokenizer, text)]


def _opening(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    if template == "moss_en":
        return _encode(tokenizer, "Assistant:")
    return [tokenizer.convert_tokens_to_ids(MOSS_ZH_TAGS[1])]


def _continue(tokenizer: PreTrainedTokenizerBase, text: str, template: str) -> list[int]:
    """Returns the ids of an answer, which starts a stretch after `<|MOSS|>` and continues one after `Assistant:`.

    A token can contain the colon and the start of the answer (":)"), but generation starts after the colon, so the
    answer is encoded after a text that it does not merge with; if there is none, as its own stretch.
    """
    if template == "moss_en":
        for before in ("Assistant:", "\n", "Assistant"):
            start, whole = _encode(tokenizer, before), _encode(tokenizer, before + text)
            if whole[: len(start)] == start:
                return whole[len(start) :]
    return _encode(tokenizer, text)
