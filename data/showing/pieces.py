"""Texts as the model sees them, in pieces: a token or a turn each, learnt or not, special or not."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from data.showing.items import Item, Side

MAX_TOKENS, MAX_TEXT = 1500, 8000  # of one side that are shown
_VISIBLE = str.maketrans({" ": "·", "\n": "↵\n", "\t": "→"})


@dataclass(frozen=True)
class Piece:
    """A text. is_learnt: an answer; is_special: a special token, or a speaker; ids: () if it is no token."""

    text: str
    is_learnt: bool = False
    is_special: bool = False
    ids: tuple[int, ...] = ()


def token_pieces(tokenizer: PreTrainedTokenizerBase, side: Side) -> list[Piece]:
    """Returns the tokens of a side, white space visible. Tokens that are one character only together are one piece."""
    ids, mask = side
    known = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    pieces, before, held = [], [], []
    for k, i in enumerate(ids):
        if MAX_TOKENS // 2 <= k < len(ids) - MAX_TOKENS // 2:
            continue
        if k and k == len(ids) - MAX_TOKENS // 2:
            pieces.append(Piece(f" … {len(ids) - MAX_TOKENS} tokens … "))
        if i in known:
            pieces.append(Piece(tokenizer.convert_ids_to_tokens(i), mask[k], True, (i,)))
            before, held = [], []
            continue
        held.append(i)
        start, whole = tokenizer.decode(before), tokenizer.decode([*before, *held])
        if whole.endswith("\ufffd") and len(held) < 4 and k + 1 < len(ids) and ids[k + 1] not in known:
            continue
        text = whole.removeprefix(start) if before else _own_text(tokenizer, held)
        pieces.append(Piece(text.translate(_VISIBLE), mask[k], False, tuple(held)))
        before, held = held, []
    return pieces


def _own_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Returns the text of the first tokens of a stretch, with the space that SentencePiece puts before it."""
    marked = str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁")
    text = tokenizer.decode(ids)
    return " " * (marked and not text.startswith(" ")) + text


def turn_pieces(item: Item, answer: int | None = None) -> list[Piece]:
    """Returns the turns of an item as text, with one of its answers; what the assistant says in it is learnt."""
    turns = item.turns if answer is None else [*item.turns, {"role": "assistant", "content": item.answers[answer]}]
    pieces = []
    for turn in turns:
        text = turn["content"]
        if len(text) > MAX_TEXT:
            text = f"{text[: MAX_TEXT // 2]} … {len(text) - MAX_TEXT} characters … {text[-MAX_TEXT // 2 :]}"
        is_learnt = turn["role"] == "assistant" and (item.kind == "dialogues" or turn is turns[-1])
        pieces += [Piece("\n")] * bool(pieces)
        pieces += [Piece(f"{turn['role']}:", is_special=True), Piece(f" {text}", is_learnt)]
    return pieces


def common_start(sides: list[list[Piece]]) -> int:
    """Returns the number of pieces with which all sides begin; those of the answers are not among them."""
    count = 0
    for pieces in zip(*sides, strict=False):
        if len(set(pieces)) > 1 or pieces[0].is_learnt:
            return count
        count += 1
    return count
