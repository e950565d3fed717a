"""Data files to records, dialogues and prompts: formats, bad data, truncation, validation sets, streams."""

import io
import itertools
import json
import os
from datetime import datetime
from itertools import islice
from types import SimpleNamespace

import pytest
from conftest import SAMPLES

from data.dialogues import EncodedDialogue
from data.encoded import Mixture
from data.formats.dialogue_forms import parse_turns
from data.formats.json_lines import json_line
from data.formats.records import Record, Tally
from data.formats.stream import dialogue_or_text, stream_records
from data.order import order
from data.preferences import load_preferences
from data.sources import read_records as read_values
from data.template import encode_dialogue, encode_prompt
from tests.helpers.data import encode_one, encode_turns, load_dialogues, load_prompts
from utils.errors import UserError
from utils.flags.data import RecordFlags
from utils.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model), "moss_en")


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def read_records(path: str) -> tuple[list[Record], list[Record]]:
    return read_values([path], RecordFlags())


HI, HI_HELLO = turns("Hi"), turns("Hi", "Hello")


def write(file, records) -> str:
    """A .json file as one list, or a .jsonl file."""
    texts = [json.dumps(record) for record in records]
    text = "\n".join(texts) if file.suffix == ".jsonl" else f"[{', '.join(texts)}]"
    file.write_text(text, encoding="utf-8")
    return str(file)


def prompts_of(path, tokenizer, max_tokens=1000, num_valid=0, seed=0):
    said = []
    train, valid = load_prompts(str(path), tokenizer, "moss_en", max_tokens, num_valid, seed, said.append)
    return train, valid, said


def test_samples_load_completely(tiny_model):
    for lang in ("en", "zh"):
        tokenizer, said = load_tokenizer(str(tiny_model), f"moss_{lang}"), []
        folder = SAMPLES / lang
        prompts = load_prompts(str(folder / "prompts"), tokenizer, f"moss_{lang}", 400, 0, 0, said.append)
        preferences = load_preferences([str(folder / "preferences")], RecordFlags(), lambda line: None)
        dialogues = load_dialogues(str(folder / "dialogues"), tokenizer, f"moss_{lang}", 400, 0, 0, said.append)
        assert [len(split) for split in (*prompts, *preferences, *dialogues)] == [24, 8, 14, 4, 14, 2]
        assert len(said) == 2  # one summary each; nothing dropped or truncated


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (["Hi"], HI),
        (["Hi", "Hello"], HI_HELLO),
        ({"messages": HI_HELLO}, HI_HELLO),
        ({"conversations": [{"from": "human", "value": " Hi "}, {"from": "gpt", "value": "Hello"}]}, HI_HELLO),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, turns("Add.\n\n1 2", "3")),
        ({"prompt": "Hi"}, HI),
        ({"prompt": HI, "response": "Hello"}, HI_HELLO),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello"}, HI_HELLO),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant: A\nHuman: b\n\nHuman: c"}, turns("Hi", "A\nHuman: b", "c")),
    ],
)
def test_dialogue_formats(record, expected):
    assert parse_turns(record) == expected


BAD_RECORDS = [["a", 3], {"id": "a", "kind": "b"}, {"messages": [{"role": ["user"], "content": "a"}]}, ["half \ud83d"]]


def test_bad_records_are_counted_and_the_others_used(tmp_path, tokenizer):
    file = write(tmp_path / "x.json", [["fine", "good"], *BAD_RECORDS])
    for load in (lambda say: load_prompts(file, tokenizer, "moss_en", 99, 0, 0, say),
                 lambda say: load_dialogues(file, tokenizer, "moss_en", 99, 0, 0, say)):  # fmt: skip
        said = []
        assert len(load(said.append)[0]) == 1
        assert sum(int(line.split()[1]) for line in said if " dropped: " in line) == len(BAD_RECORDS)
        assert any(f"first at {file}:record 2" in line for line in said)


def test_answers_that_prompts_lose_and_questions_that_dialogues_lose(tmp_path, tokenizer):
    file, said = write(tmp_path / "x.jsonl", [["a", "b", "c"], ["b", "c"], ["d", "e"]]), []
    train, _, lost = prompts_of(file, tokenizer)
    assert [len(prompt.turns) for prompt in train] == [3, 1, 1]
    assert train[1].ids == encode_prompt(tokenizer, turns("b"), "moss_en")
    assert lost[0] == f"prompts: 2 ended in the assistant's answer, which was cut off; first at {file}:2, then :3"
    train, _ = load_dialogues(file, tokenizer, "moss_en", 99, 0, 0, said.append)
    assert train[0] == EncodedDialogue(*encode_dialogue(tokenizer, turns("a", "b"), "moss_en"), f"{file}:1")
    assert said[0].startswith("dialogues: 1 ended in a question") and said[0].endswith("x.jsonl:1")


def test_prompts_lose_their_oldest_exchanges(tmp_path, tokenizer):
    system = {"role": "system", "content": "Be kind."}
    spoken = turns("one " * 30 + "end", "two", "three", "four", "five")
    records = [["Hi"], {"messages": [system, *spoken]}, {"messages": spoken}, ["six " * 200]]
    budget = len(encode_prompt(tokenizer, [system, *spoken[2:]], "moss_en"))
    train, _, said = prompts_of(write(tmp_path / "x.json", records), tokenizer, budget)
    assert [prompt.turns for prompt in train] == [HI, [system, *spoken[2:]], spoken[2:]]
    assert said[0].startswith("prompts: 2 truncated") and said[0].endswith("x.json:record 2, then :record 3")
    assert f"1 dropped: longer than --maxlen_prompt - --maxlen_res = {budget} tokens" in said[1]
    assert prompts_of(tmp_path / "x.json", tokenizer, budget - 1)[0][1].turns == [system, spoken[4]]


def test_dialogues_lose_their_oldest_exchanges(tokenizer):
    said, short = [], turns("Third?", "Fourth.")
    long = turns("word " * 30 + ".", "word " * 30 + ".")
    fitting = encode_turns(tokenizer, [long + short, long, short], "moss_en", 30, said.append)
    expected = encode_dialogue(tokenizer, short, "moss_en")
    assert [(item.ids, item.answer_mask, item.source) for item in fitting] == [(*expected, "x:1"), (*expected, "x:3")]
    assert said[0].endswith("to --context_truncate; first at x:1")
    assert said[1].endswith("exceeds --context_truncate; first at x:2")
    assert encode_one(tokenizer, short, "moss_en", len(expected[0]))[0].ids == expected[0]
    assert encode_one(tokenizer, short, "moss_en", len(expected[0]) - 1) == (None, 0)


def test_the_first_places_per_reason_are_named():
    tally = Tally("records")
    for place in ("a:1", "a:1", "a:7", "b:2", "a:9", "b:3", "b:3", "b:4", "b:5"):
        tally.add("bad" if place != "b:5" else "worse", place)
    bad, worse = tally.lines()
    assert (
        bad == "records: 8 bad; first at a:1, then :7, b:2, a:9, b:3, …" and worse == "records: 1 worse; first at b:5"
    )


def test_validation_files_or_a_seeded_part(tmp_path, tokenizer):
    write(tmp_path / "a_train.json", [[f"a {i}"] for i in range(5)])
    write(tmp_path / "b_train.jsonl", [[f"b {i}"] for i in range(5)])
    write(tmp_path / "notes.json", [["not read"]])
    train, valid, said = prompts_of(tmp_path, tokenizer, num_valid=3)
    texts = [prompt.turns[0]["content"] for prompt in (*train, *valid)]
    assert sorted(texts) == sorted([f"{name} {i}" for name in "ab" for i in range(5)])
    assert len(valid) == 3 and any("3 held out by seed 0" in line for line in said)
    assert prompts_of(tmp_path, tokenizer, num_valid=3)[1] == valid
    assert prompts_of(tmp_path, tokenizer, num_valid=3, seed=1)[1] != valid
    write(tmp_path / "a_valid.json", [["held out"]])
    train, valid, _ = prompts_of(tmp_path, tokenizer, num_valid=3)
    assert (len(train), len(valid)) == (10, 1)


def test_lines_and_numbers_of_records(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('\ufeff[ {"prompt":\n "a"}, ["b"],\n\n["c\u2028"]\n]\n', encoding="utf-8")
    expected = [({"prompt": "a"}, "1"), (["b"], "2"), (["c\u2028"], "3")]
    assert read_records(str(file))[0] == [Record(value, f"{file}:record {number}") for value, number in expected]
    lines = tmp_path / "x.jsonl"
    lines.write_text('["a\u2028"]\r\n\r\n["b"]\n', encoding="utf-8")
    assert read_records(str(lines))[0] == [Record(["a\u2028"], f"{lines}:1"), Record(["b"], f"{lines}:3")]


def test_pipes_are_refused_and_not_waited_for(tmp_path):
    """Each rank reads a file, and a run that goes on reads it again; the pipe of `<(zcat x)` is read once."""
    (tmp_path / "data").mkdir()
    for name in ("pipe.json", "data/train.json", "data/a_train.jsonl"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"--data_path: .*pipe.json is a pipe or a device; write its content to a file"):
        read_records(str(tmp_path / "pipe.json"))
    with pytest.raises(UserError, match=r"--data_path: cannot read .*data/a_train.jsonl: not a regular file"):
        read_records(str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"--input: .*pipe.json does not exist or is not a file; .* - for a pipe"):
        list(stream_records(str(tmp_path / "pipe.json"), "--input"))


def test_files_beyond_memory_are_refused(tmp_path):
    """Files of holes: a terabyte that is no list, and a line of 64 MB, which could go on for ever."""
    for name, size in {"a.json": 1 << 40, "b.jsonl": (1 << 26) + 1}.items():
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    with pytest.raises(UserError, match=r"a.json: the file is not a JSON list of records"):
        read_records(str(tmp_path / "a.json"))
    with pytest.raises(UserError, match=r"b.jsonl:1: the line has more than 64 MB; write one record per line"):
        list(stream_records(str(tmp_path / "b.jsonl"), "--input"))


def test_missing_paths_stay_local(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(UserError, match=r"--data_path: .*does not exist"):
        read_records("data/nowhere")


def test_hub_data_sets(monkeypatch):
    import datasets

    parts = {name: datasets.Dataset.from_list([{"prompt": text}], split=name) for name, text in
             (("train", "a"), ("validation", "b"))}  # fmt: skip
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: datasets.DatasetDict(parts))
    train, valid = read_records("owner/set")
    assert (train, valid[0].value) == ([Record({"prompt": "a"}, "owner/set[train]:1")], {"prompt": "b"})
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: {"test": []})
    with pytest.raises(UserError, match="no train split, only test"):
        read_records("owner/set")


def test_rows_of_tables(tmp_path, tokenizer):
    import datasets

    rows = {"prompt": ["Hi", "Bye"], "response": ["Hello", "Ciao"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("prompt,response\nHi,Hello\nBye,Ciao\n")
    for name in ("x.parquet", "x.csv"):
        train, _ = load_dialogues(str(tmp_path / name), tokenizer, "moss_en", 99, say=lambda _: None)
        expected = [encode_dialogue(tokenizer, turns(*texts), "moss_en") for texts in zip(*rows.values(), strict=True)]
        assert [(dialogue.ids, dialogue.answer_mask) for dialogue in train] == expected
        assert train[1].source == f"{tmp_path}/{name}:{'row 2' if name == 'x.parquet' else 3}"


def test_data_without_a_usable_record(tmp_path, tokenizer):
    file = tmp_path / "train.json"
    write(file, [["much too long"], [""]])
    with pytest.raises(UserError, match=r"--data_path .*no usable prompts left .*1 dropped: longer than .* = 4 tokens"):
        prompts_of(file, tokenizer, 4)
    write(file, [["a"]])
    write(tmp_path / "valid.json", [[""]])
    with pytest.raises(UserError, match=r"left for validation .*an empty turn.*valid.json:record 1"):
        prompts_of(tmp_path, tokenizer)


def test_all_records_can_be_written_again():
    """A lone surrogate from a JSON escape, and a date from a .parquet file."""
    value = {"text": "你好", "half": "\ud83d", "when": datetime(2026, 1, 2), "lines": "a\nb"}
    line = json_line(value)
    line.encode()
    assert line.count("\n") == 1
    assert json.loads(line) == value | {"when": "2026-01-02 00:00:00"}


def items(name: str, count: int) -> list[EncodedDialogue]:
    return [EncodedDialogue([1], [False], f"{name}{i}") for i in range(count)]


def test_batches_of_one_set_and_of_weighted_sets():
    stream = Mixture([items("a", 3), items("b", 4)], None, seed=2).batches(5)
    names = ["a0", "a1", "a2", "b0", "b1", "b2", "b3"]
    seen = [item.source for batch in islice(stream, 4) for item in batch]
    assert seen == [names[i] for i in order(0, 20, 7, seed=2)]
    stream = Mixture([items("a", 3), items("b", 400)], [3, 1], seed=2).batches(100)
    seen = [item.source[0] for batch in islice(stream, 10) for item in batch]
    assert seen.count("a") == 750 and 60 <= seen[:100].count("a") <= 90


def test_streams_of_files(tmp_path):
    lines, texts = tmp_path / "x.jsonl", tmp_path / "x.txt"
    lines.write_bytes('\ufeff["a", "b"]\n\n{"prompt": "\u2028"}\n'.encode())
    texts.write_text('first\n \n["a"]\n')
    whole = write(tmp_path / "x.json", [["a", "b"], ["c", "d"]])
    expected = [Record(["a", "b"], f"{lines}:1"), Record({"prompt": "\u2028"}, f"{lines}:3")]
    assert list(stream_records(str(lines), "--input")) == expected
    assert list(stream_records(str(texts), "--input")) == [Record("first", f"{texts}:1"), Record('["a"]', f"{texts}:3")]
    assert [r.source for r in stream_records(whole, "--input")] == [f"{whole}:record 1", f"{whole}:record 2"]
    assert next(r.value for r in stream_records(str(lines), "--input", "text")) == '["a", "b"]'


@pytest.mark.parametrize(
    ("content", "form", "expected"),
    [
        (b'["a"]\n"b"\n', "auto", [["a"], "b"]),
        (b"\nHello\n[b]", "auto", ["Hello", "[b]"]),
        (b"3\n", "json", [3]),
    ],
)
def test_streams_of_pipes(monkeypatch, content, form, expected):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert [record.value for record in stream_records("-", "--input", form)] == expected
    endless = (b'"%d"\n' % i for i in itertools.count())
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=SimpleNamespace(readline=lambda size: next(endless))))
    assert next(stream_records("-", "--input")) == Record("0", "stdin:1")  # of an endless pipe


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "Hi", "response": ""}, turns("Hi", "")),
        ("\n\nHuman: Hi\n\nAssistant: Hello", HI_HELLO),
        ("A sentence.", "A sentence."),
        ({"text": "A sentence.", "id": 3}, "A sentence."),
        ({"text": "not this", "prompt": "Hi", "response": "Hello"}, HI_HELLO),
    ],
    ids=repr,
)
def test_dialogues_and_texts_to_score(value, expected):
    assert dialogue_or_text(value) == expected


def test_the_system_column_is_the_system_turn_unless_there_is_one():
    system = [{"role": "system", "content": "Be brief."}]
    shared_gpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert parse_turns(shared_gpt | {"system": "Be brief."}) == [*system, *HI_HELLO]
    assert parse_turns({"messages": [*system, *HI], "system": "Be long."}) == [*system, *HI]
    assert parse_turns(shared_gpt | {"system": " "}) == parse_turns(shared_gpt | {"system": None}) == HI_HELLO
