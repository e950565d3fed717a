"""Dialogues to token ids and back: the one encoder that prompts, reward model, SFT and generation share.

moss_en   <s>Human:question</s>Assistant:answer</s>Human:…
moss_zh   <s><|Human|>question</s><|MOSS|>answer</s><|Human|>…
chat      the tokenizer's own chat template

In the moss templates every stretch between special tokens is encoded on its own, with SentencePiece's dummy prefix,
and `</s>` follows every utterance; special tokens spelt out in a text stay text (in a chat template's history they
become tokens: the template writes text and nothing else). A system turn goes in front of the first question, with an
empty line between, since these models know no third role.
"""

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from utils.errors import UserError
from utils.tokenizer import MOSS_ZH_TAGS

TEMPLATES = ("moss_en", "moss_zh", "chat")
Turns = list[dict[str, str]]


def template_for(lang: str, template: str | None) -> str:
    """The template's name: `--template` if given, else the one of `--lang`. Raises UserError for unknown names."""
    if template is None and lang in ("en", "zh"):
        return f"moss_{lang}"
    if template is None:
        raise UserError(f"--lang {lang}: must be en or zh (or give --template {', '.join(TEMPLATES)})")
    if template not in TEMPLATES:
        raise UserError(f"--template {template}: must be one of {', '.join(TEMPLATES)}")
    return template


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str) -> list[int]:
    """Ids of everything before the answer; `turns` are [{"role", "content"}, …] and the last is the human's."""
    if template == "chat":
        return _encode_chat(tokenizer, turns)
    return _encode_moss(tokenizer, turns, template)[0]


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, turns: Turns, template: str) -> tuple[list[int], list[bool]]:
    """Ids of a whole dialogue that ends in the assistant's turn, and a mask of the assistant's tokens and their EOS.

    The ids begin with `encode_prompt(turns[:-1])`, exactly: the answer continues the prompt here as in generation.
    """
    prompt = encode_prompt(tokenizer, turns[:-1], template)
    if template == "chat":
        mask, answer = _mask_chat(tokenizer, turns[:-1], prompt), _answer_chat(tokenizer, turns, prompt)
    else:
        mask = _encode_moss(tokenizer, turns[:-1], template)[1]
        answer = _continue(tokenizer, turns[-1]["content"], template)
    answer = [*answer, tokenizer.eos_token_id]
    return prompt + answer, mask + [True] * len(answer)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that is no dialogue: BOS, if the tokenizer has one, the text and EOS."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*bos, *_encode(tokenizer, text), tokenizer.eos_token_id]


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of response ids: special tokens and ids beyond the tokenizer's (a padded embedding) are left out."""
    known = [i for i in ids if i < len(tokenizer)]
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


def _answer_chat(tokenizer: PreTrainedTokenizerBase, turns: Turns, prompt: list[int]) -> list[int]:
    """Ids of the last turn as the template writes it behind `prompt`, without what follows the EOS.

    Where the template or a merge across the border changes the text or the prompt, the answer is encoded on its own.
    """
    text, whole = turns[-1]["content"], _encode_chat(tokenizer, turns, open_answer=False)
    ids = whole[len(prompt) :]
    if tokenizer.eos_token_id in ids:
        ids = ids[: len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)]
    same_prompt, same_text = whole[: len(prompt)] == prompt, tokenizer.decode(ids).strip() == text.strip()
    usable = same_prompt and same_text and tokenizer.eos_token_id not in ids  # an EOS spelt out in the text
    return ids if usable else _encode(tokenizer, text)


def _encode_chat(tokenizer: PreTrainedTokenizerBase, turns: Turns, open_answer: bool = True) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_answer)
    except TemplateError as error:  # some templates refuse system turns
        raise UserError(f"--template chat: the tokenizer's chat template refuses a dialogue: {error}") from error
    return tokenizer.encode(text, add_special_tokens=False)


def _mask_chat(tokenizer: PreTrainedTokenizerBase, turns: Turns, ids: list[int]) -> list[bool]:
    """Mask of the earlier answers within the prompt `ids`, found by rendering the dialogue up to and past each.

    An answer that the template renders differently once it is history (one that cuts out reasoning, say) is left out.
    """
    mask = [False] * len(ids)
    for k, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        start, stop = _encode_chat(tokenizer, turns[:k]), _encode_chat(tokenizer, turns[: k + 1], open_answer=False)
        if ids[: len(start)] != start or ids[: len(stop)] != stop:
            continue
        # The template may write on after the end of the answer (a newline): the EOS is the last that counts.
        inside = range(len(start), len(stop))
        end = next((t + 1 for t in inside if ids[t] == tokenizer.eos_token_id), len(stop))
        mask[len(start) : end] = [True] * (end - len(start))
    return mask
