"""Arbitrary data and texts: records are kept or counted, files are refused with their place, masks cover answers."""

import contextlib
import json
import re
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat import turn_end
from data.formats.columns import PLAIN
from data.formats.dialogue_forms import parse_turns
from data.formats.records import BadRecord
from data.sources import Part
from data.template import decode_answer, encode_dialogue, encode_prompt, last_answer
from reward.encode import ComparisonEncoder
from reward.scoring.ensemble import Encoding
from tests.helpers.data import load, load_dialogues, load_prompts
from tests.helpers.fuzzing import dialogue_records, ends, fuzz, preference_records, search, texts, values, whole
from utils.errors import UserError
from utils.tokenizer import MOSS_ZH_TAGS, load_tokenizer

WINDOW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model), "moss_en")


def lines_of(records: list, ascii_only: bool) -> bytes:
    """A .jsonl file, with everything that json writes: NaN, escapes or characters as they are."""
    text = "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records)
    return text.encode("utf-8", "surrogatepass" if ascii_only else "replace")


def one_line(error: UserError) -> str:
    text = str(error)
    assert "\n" not in text and "\r" not in text
    return text


def counted(said: list[str], what: str) -> int:
    """How many records are said to have been dropped."""
    return sum(int(match[1]) for line in said if (match := re.match(rf"{what}: (\d+) dropped: ", line)))


def check_loader(load, what: str, records: list, ascii_only: bool, num_valid: int, folder) -> list:
    """Every record is kept, or counted as dropped with a place; gives what was kept."""
    file, said = folder / "x.jsonl", []
    file.write_bytes(lines_of(records, ascii_only))
    with ends():
        try:
            train, valid = load(str(file), num_valid, said.append)
        except UserError as error:
            text = one_line(error)
            assert "--data_path" in text
            if "too few to hold out" in text:
                kept = int(re.search(r": (\d+) usable", text)[1])
                assert kept <= num_valid and kept + counted(said, what) == len(records)
            elif records:
                assert counted(said, what) == len(records)
            return []
    assert len(train) + len(valid) + counted(said, what) == len(records)
    where = re.compile(r"; first at .*x\.jsonl:\d+(, then (:\d+|…)(, (:\d+|…))*)?$")
    assert all(where.search(line) for line in said if "dropped" in line)
    places = [item.source for item in train + valid]
    assert len(set(places)) == len(places)
    return train + valid


lists = st.lists(dialogue_records, max_size=6)


@fuzz
@given(lists, st.booleans(), st.integers(0, 3))
def test_fuzz_dialogues(folder, tokenizer, records, ascii_only, num_valid):
    def load(path, num_valid, say):
        return load_dialogues(path, tokenizer, "moss_en", 10**6, num_valid, 0, say)

    for dialogue in check_loader(load, "dialogues", records, ascii_only, num_valid, folder):
        assert len(dialogue.ids) == len(dialogue.answer_mask)
        assert dialogue.answer_mask[-1] and not dialogue.answer_mask[0]
    with ends(), contextlib.suppress(UserError):
        short, _ = load_dialogues(str(folder / "x.jsonl"), tokenizer, "moss_en", WINDOW, 0, 0, str)
        assert all(len(dialogue.ids) <= WINDOW and any(dialogue.answer_mask) for dialogue in short)


@fuzz
@given(lists, st.booleans(), st.integers(0, 3))
def test_fuzz_prompts(folder, tokenizer, records, ascii_only, num_valid):
    def load(path, num_valid, say):
        return load_prompts(path, tokenizer, "moss_en", WINDOW, num_valid, 0, say)

    for prompt in check_loader(load, "prompts", records, ascii_only, num_valid, folder):
        assert prompt.turns[-1]["role"] == "user"
        assert 0 < len(prompt.ids) <= WINDOW


@fuzz
@given(st.lists(preference_records, max_size=6), st.booleans(), st.integers(0, 3))
def test_fuzz_preferences(folder, tokenizer, records, ascii_only, num_valid):
    margins = ("mean preference difference", "margin")

    def load_all(path, num_valid, say, window=10**6):
        encoder = ComparisonEncoder(tokenizer, "moss_en", window, PLAIN, margins)
        return load(encoder, path, num_valid, 0, say)

    for item in check_loader(load_all, "preferences", records, ascii_only, num_valid, folder):
        places = range(len(item.answers))
        assert item.pairs
        for better, worse in item.pairs:
            assert better in places and worse in places and item.answers[better] != item.answers[worse]
        item.subset.encode()  # it becomes the name of a metric
        assert len({tuple(ids[: item.prompt_length]) for ids in item.answers}) == 1
        assert all(len(ids) > item.prompt_length for ids in item.answers)
    with ends(), contextlib.suppress(UserError):
        short, _ = load_all(str(folder / "x.jsonl"), 0, str, WINDOW)
        assert all(max(map(len, item.answers)) <= WINDOW for item in short)


@fuzz
@given(dialogue_records, st.booleans())
def test_fuzz_turns(value, empty_answer):
    """What comes out can be encoded, and goes in again as it is."""
    with ends():
        try:
            turns = parse_turns(value, empty_answer)
        except BadRecord as error:
            assert "\n" not in str(error)
            return
    assert parse_turns({"messages": turns}, empty_answer) == turns
    spoken = turns[turns[0]["role"] == "system" :]
    assert [turn["role"] for turn in spoken] == [("user", "assistant")[k % 2] for k in range(len(spoken))]
    for turn in turns:
        assert turn["content"].strip() == turn["content"]
        turn["content"].encode()


@st.composite
def damaged(draw) -> bytes:
    """JSON after one to three random changes of its bytes."""
    items = draw(st.lists(values, max_size=5))
    content = json.dumps(items, indent=draw(st.sampled_from([None, 1]))).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(1, 3))):
        place, size = draw(st.integers(0, len(content))), draw(st.integers(0, 8))
        new = draw(st.binary(max_size=4) | st.sampled_from([b"[", b"]", b",", b"\n", b'"']))
        content = content[:place] + new + content[place + size :]
    return content


@fuzz
@given(damaged() | st.binary(max_size=60), st.sampled_from(["json", "jsonl"]))
def test_fuzz_damaged_json(folder, content, ending):
    """Damaged files are refused with their line, unless Python's parser accepts them, too."""
    file = folder / f"damaged.{ending}"
    file.write_bytes(content)
    with ends():
        try:
            found = list(Part(str(file)).records())
        except UserError as error:
            text = one_line(error)
            if "not a JSON list" not in text:
                line = int(re.match(rf"{re.escape(str(file))}:(\d+): ", text)[1])
                assert 1 <= line <= content.count(b"\n") + 1
            return
    text = content.decode("utf-8-sig")
    if ending == "json":
        expected = json.loads(text) if text.strip() else []
        assert [record.source for record in found] == [f"{file}:record {k + 1}" for k in range(len(expected))]
    else:
        expected = [json.loads(line) for line in text.split("\n") if line.strip()]
    assert repr([record.value for record in found]) == repr(expected)  # NaN is not equal to itself


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
    fixture = {"llama": "llama_model", "chat": "chat_folder"}[kind]
    return load_tokenizer(str(request.getfixturevalue(fixture)), template), template


def turns_of(with_system: bool, contents: list[str]) -> list[dict]:
    """A dialogue that ends in the assistant's turn."""
    contents = contents[: len(contents) // 2 * 2]
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]
    return ([{"role": "system", "content": "Be brief."}] if with_system else []) + turns


def stretches(ids: list[int], mask: list[bool]) -> list[list[int]]:
    """Runs of True, as ids."""
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [[i for i, _ in run] for inside, run in runs if inside]


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
