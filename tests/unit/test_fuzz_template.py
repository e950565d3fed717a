"""Templates on arbitrary texts: the mask covers the answers, and a dialogue begins with its prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat import turn_end
from data.template import decode_answer, encode_dialogue, encode_prompt, last_answer
from reward.scoring.ensemble import Encoding
from tests.helpers.fuzzing import ends, search, texts, whole
from utils.tokenizer import MOSS_ZH_TAGS, load_tokenizer

KINDS = ["llama moss_en", "llama moss_zh", "chat moss_en", "chat chat"]
fuzz_each = search(parts=len(KINDS))
SPACE_MARK = "▁"  # SentencePiece's own name for a space: it comes back as one


def usable(text: str) -> bool:
    """As data/formats/dialogue_forms.py lets texts through."""
    return text.strip() != "" and not any("\ud800" <= char <= "\udfff" for char in text)


contents = (texts | st.text(whole, min_size=1, max_size=40)).filter(usable).map(str.strip)
dialogues = st.tuples(st.booleans(), st.lists(contents, min_size=2, max_size=6))


@pytest.fixture(scope="module", params=KINDS)
def setting(request):
    kind, template = request.param.split()
    fixture = {"llama": "llama_model", "tiny": "tiny_model", "chat": "chat_folder"}[kind]
    return load_tokenizer(str(request.getfixturevalue(fixture)), template), template


def turns_of(with_system: bool, contents: list[str]) -> list[dict]:
    """A dialogue that ends in the assistant's turn."""
    contents = contents[: len(contents) // 2 * 2]
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]
    return ([{"role": "system", "content": "Be brief."}] if with_system else []) + turns


def stretches(ids: list[int], mask: list[bool]) -> list[list[int]]:
    """Runs of True, as ids."""
    found, inside = [], False
    for i, now in zip(ids, mask, strict=True):
        if now:
            found = found if inside else [*found, []]
            found[-1].append(i)
        inside = now
    return found


@fuzz_each
@given(dialogues)
def test_fuzz_template(setting, drawn):
    tokenizer, template = setting
    turns = turns_of(*drawn)
    with ends():
        prompt = encode_prompt(tokenizer, turns[:-1], template)
        ids, mask = encode_dialogue(tokenizer, turns, template)
    eos, answer = tokenizer.eos_token_id, turns[-1]["content"]
    assert ids[: len(prompt)] == prompt and len(mask) == len(ids)
    learnt = ids[last_answer(mask)]
    assert last_answer(mask).start == len(prompt) and learnt[-1] == eos and eos not in learnt[:-1]
    assert tokenizer.decode(ids[last_answer(mask).stop :]) == ("\n" if template == "chat" else "")
    assert max(ids) < len(tokenizer)
    tags = tokenizer.added_tokens_encoder if template == "chat" else ()  # there a tag that is spelt out is a tag
    if SPACE_MARK not in answer and not any(tag in answer for tag in tags):
        assert decode_answer(tokenizer, ids[len(prompt) :]) == answer
    if template != "chat":
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        runs = stretches(ids, mask)
        assert len(runs) == len(answers) and all(run[-1] == eos and eos not in run[:-1] for run in runs)
        assert ids.count(eos) == len(turns) - (turns[0]["role"] == "system")
        for text, run in zip(answers, runs, strict=True):
            assert SPACE_MARK in text or decode_answer(tokenizer, run) == text
    if template == "moss_zh":
        tags = [tokenizer.convert_tokens_to_ids(tag) for tag in MOSS_ZH_TAGS]
        assert [ids.count(tag) for tag in tags] == [len(answers), len(answers)]


@fuzz_each
@given(dialogues, st.integers(4, 60))
def test_fuzz_window(setting, drawn, window):
    """A reward model's window is kept, whatever has to go; the answer's end is not."""
    tokenizer, template = setting
    turns = turns_of(*drawn)
    encoding, end = Encoding(tokenizer, template, window), turn_end(tokenizer, template)
    with ends():
        ids, cut = encoding(turns)
    assert len(ids) <= window and tuple(ids[-len(end.ids) :]) == end.ids
    assert cut == (len(Encoding(tokenizer, template, None)(turns)[0]) > window)
