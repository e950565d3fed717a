"""Render dialogues with a chat template and encode texts; in a batch, many in one call and each stretch once."""

import re
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from itertools import chain, pairwise

from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

from utils.errors import UserError
from utils.limits import limited
from utils.tokenizer import encode_texts

Turns = list[dict[str, str]]
_MAX_BYTES, _MAX_TEXT = 2**30, 200_000  # of rendering a dialogue: memory, and characters beside those of its texts


class Texts:
    """Encodes the texts of dialogues, and remembers the ids.

    A rendered dialogue is cut before its special tokens, and each stretch is encoded once. What a tokenizer makes of a
    stretch does not depend on the text before it, because it encodes the text between special tokens separately.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._plain: dict[str, list[int]] = {}
        self._marked: dict[str, list[int]] = {}
        self._chats: dict[tuple, list[list[int]]] = {}  # the ids of a dialogue's stretches
        self._special: re.Pattern | None = None  # before what rendered texts are cut; known from the first batch on

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase | Texts") -> "Texts":
        """Returns `tokenizer` itself if it is a Texts, else a new one."""
        return tokenizer if isinstance(tokenizer, cls) else cls(tokenizer)

    def plain(self, text: str) -> list[int]:
        """Returns the ids of a stretch of plain text; special tokens written out in it stay text."""
        if text not in self._plain:
            self.encode_plain([text])
        return self._plain[text]

    def encode_plain(self, texts: Iterable[str]) -> None:
        """Encodes the stretches of plain text that are not known, in one call."""
        self._encode(self._plain, texts, True)

    def chat(self, turns: Turns, open_answer: bool) -> list[int]:
        """Returns the ids of a dialogue as of `render`, in which special tokens are tokens. The template writes BOS."""
        key = _key(turns, open_answer)
        if key not in self._chats:
            self._render({key: turns}, open_answer)
        return list(chain.from_iterable(self._chats[key]))

    def encode_chats(self, dialogues: list[tuple[Turns, bool]]) -> None:
        """Renders and encodes the (turns, open_answer) that are not known; if one fails, `chat` will tell which."""
        self._special = self._special or _special_tokens(self.tokenizer)
        for open_answer in (True, False):
            keys = {_key(turns, end): turns for turns, end in dialogues if end == open_answer}
            with suppress(UserError):
                self._render({key: turns for key, turns in keys.items() if key not in self._chats}, open_answer)

    def _render(self, dialogues: dict[tuple, Turns], open_answer: bool) -> None:
        cut = [self._cut(text) for text in _render_all(self.tokenizer, list(dialogues.values()), open_answer)]
        self._encode(self._marked, chain.from_iterable(cut), False)
        for key, stretches in zip(dialogues, cut):
            self._chats[key] = [self._marked[stretch] for stretch in stretches]

    def _encode(self, known: dict[str, list[int]], texts: Iterable[str], split_special_tokens: bool) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, encode_texts(self.tokenizer, new, split_special_tokens)))

    def _cut(self, text: str) -> list[str]:
        """Returns the text in stretches, each of which but the first begins with a special token."""
        cuts = [found.start() for found in self._special.finditer(text)] if self._special else []
        return [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)]) if start < stop]


def _key(turns: Turns, open_answer: bool) -> tuple:
    return (open_answer, *chain.from_iterable(chain.from_iterable(map(dict.items, turns))))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    """Returns an expression for the added tokens; None if the text before one of them can depend on it."""
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.content]
    if not tokens or any(token.lstrip or token.single_word for token in tokens):
        return None
    # The tokenizers library looks for `normalized` tokens within the stretches between the others.
    texts = {token.content for token in tokens if not (tokenizer.is_fast and token.normalized)}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))) if texts else None


def render(tokenizer: PreTrainedTokenizerBase, turns: Turns, open_answer: bool) -> str:
    """Returns the dialogue rendered by the template. Raises UserError if the template refuses it, or takes too much."""
    return _render_all(tokenizer, [turns], open_answer)[0]


def _render_all(tokenizer: PreTrainedTokenizerBase, dialogues: list[Turns], open_answer: bool) -> list[str]:
    arguments = template_arguments(tokenizer)
    if not dialogues:
        return []
    try:
        _check_template(str(tokenizer.chat_template))
        with limited(2 + sum(map(len, dialogues)) / 1000, _MAX_BYTES):
            texts = tokenizer.apply_chat_template(
                dialogues, tokenize=False, add_generation_prompt=open_answer, **arguments
            )
        for text, turns in zip(texts, dialogues, strict=True):
            if len(text) > _MAX_TEXT + 100 * sum(1 + len(turn["content"]) for turn in turns):
                raise ValueError(f"it writes {len(text)} characters")
            text.encode()  # raises an error for half a character
        return texts
    except Exception as error:  # some templates refuse system turns; all others are programs that can fail anyhow
        given = " or --chat_template_kwargs" if arguments else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        refuses = f"the tokenizer's chat template refuses a dialogue ({reason})"
        raise UserError(f"--template chat: {refuses}; fix the data{given}, or use another --template") from error


@lru_cache(maxsize=8)
def _check_template(template: str) -> None:
    """Raises ValueError for a template with powers: 7 ** 99999999 is one instruction, which no time limit stops."""
    tokens = [(kind, value) for _, kind, value in Environment().lex(template) if kind != "whitespace"]
    for before, token in pairwise(tokens):
        if token == ("operator", "**") and before not in (("operator", "("), ("operator", ",")):
            raise ValueError("it computes powers (**), which chat templates do not need")


def template_arguments(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Returns the --chat_template_kwargs that `load_tokenizer` stored."""
    return getattr(tokenizer, "chat_template_kwargs", {})
