"""Dialogues to token ids and back: the one encoder that prompts, reward model, SFT and generation share.

moss_en   <s>Human:question</s>Assistant:answer</s>Human:…
moss_zh   <s><|Human|>question</s><|MOSS|>answer</s><|Human|>…
chat      the tokenizer's own chat template: data/chat.py

In the moss templates every stretch between special tokens is encoded on its own, with SentencePiece's dummy prefix,
and `</s>` follows every utterance; special tokens spelt out in a text stay text (in a chat template's history they
become tokens: the template writes text and nothing else). A system turn goes in front of the first question, with an
empty line between, since these models know no third role.
"""

from transformers import PreTrainedTokenizerBase

from data.chat import Turns, closed_answer, earlier_answers, encode_chat, turn_end
from utils.tokenizer import MOSS_ZH_TAGS, stop_ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str) -> list[int]:
    """Ids of everything before the answer; `turns` are [{"role", "content"}, …] and the last is the human's."""
    if template == "chat":
        return encode_chat(tokenizer, turns)
    return _encode_moss(tokenizer, turns, template)[0]


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str) -> tuple[list[int], list[bool]]:
    """Ids of a whole dialogue that ends in the assistant's turn, and a mask of the assistant's tokens and their ends.

    The ids begin with `encode_prompt(turns[:-1])`, exactly: the answer continues the prompt here as in generation. They
    end as the template ends a turn; what it writes behind the turn's end token (a newline) is not in the mask.
    """
    ids, mask, _ = encode_answers(tokenizer, turns, template)
    return ids, mask


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str
) -> tuple[list[int], list[bool], list[int]]:
    """`encode_dialogue`, and the places of the turns whose answers the mask lacks: the history has them otherwise."""
    prompt, end, changed = encode_prompt(tokenizer, turns[:-1], template), turn_end(tokenizer, template), []
    if template == "chat":
        mask, changed = earlier_answers(tokenizer, turns[:-1], prompt)
        answer = closed_answer(tokenizer, turns, prompt)
    else:
        mask = _encode_moss(tokenizer, turns[:-1], template)[1]
        answer = [*_continue(tokenizer, turns[-1]["content"], template), *end.ids]
    behind = len(end.ids) - end.learnt
    return prompt + answer, mask + [True] * (len(answer) - behind) + [False] * behind, changed


def last_answer(mask: list[bool]) -> slice:
    """Where the last answer stands in a dialogue with this mask of `encode_dialogue`, its end token included."""
    stop = len(mask) - mask[::-1].index(True)
    return slice(stop - mask[:stop][::-1].index(False), stop)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that is no dialogue: BOS, if the tokenizer has one, the text and EOS."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*bos, *_encode(tokenizer, text), tokenizer.eos_token_id]


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of response ids: special tokens and ids beyond the tokenizer's (a padded embedding) are left out.

    So are ids that end an answer, special or not.
    """
    ends = stop_ids(tokenizer)
    known = [i for i in ids if i < len(tokenizer) and i not in ends]
    return tokenizer.decode(known, skip_special_tokens=True).strip()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of one stretch of plain text; a special token's name in it is just characters."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _encode_moss(tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str) -> tuple[list[int], list[bool]]:
    """(ids, mask) of `turns`, open for the assistant's next answer."""
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
    """Ids of an answer. After `<|MOSS|>` it begins a stretch; after `Assistant:` it goes on within one.

    A piece may straddle the colon (":)"), which generation cannot produce, as its prompt is fixed by then. So the
    answer is read off behind a stand-in that it does not merge with; last resort, it begins a stretch of its own.
    """
    if template == "moss_en":
        for before in ("Assistant:", "\n", "Assistant"):
            start, whole = _encode(tokenizer, before), _encode(tokenizer, before + text)
            if whole[: len(start)] == start:
                return whole[len(start) :]
    return _encode(tokenizer, text)
