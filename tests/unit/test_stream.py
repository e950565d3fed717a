"""Records of a file or a pipe, one after the other: forms, places, what is not readable."""

import io
import itertools
import json
from types import SimpleNamespace

import pytest

from data.formats.records import BadRecord, Record
from data.formats.stream import dialogue_or_text, stream_records
from utils.errors import UserError


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def test_lines_of_files(tmp_path):
    lines, texts, whole = (tmp_path / name for name in ("x.jsonl", "x.txt", "x.json"))
    lines.write_bytes('\ufeff["a", "b"]\n\n{"prompt": "\u2028"}\n'.encode())
    texts.write_text('first\n \n["a"]\n')
    whole.write_text('[["a", "b"],\n["c", "d"]]')
    assert list(stream_records(str(lines), "--input")) == [
        Record(["a", "b"], f"{lines}:1"),
        Record({"prompt": "\u2028"}, f"{lines}:3"),
    ]
    assert list(stream_records(str(texts), "--input")) == [Record("first", f"{texts}:1"), Record('["a"]', f"{texts}:3")]
    assert [r.source for r in stream_records(str(whole), "--input")] == [f"{whole}:1", f"{whole}:2"]
    assert next(r.value for r in stream_records(str(lines), "--input", "text")) == '["a", "b"]'


@pytest.mark.parametrize(
    ("content", "form", "expected"),
    [
        (b'["a"]\n"b"\n', "auto", [["a"], "b"]),
        (b"\nHello\n[b]", "auto", ["Hello", "[b]"]),
        (b"[laughs] Hello", "text", ["[laughs] Hello"]),
        (b"3\n", "json", [3]),
        (b" \n", "auto", []),
    ],
)
def test_pipes(monkeypatch, content, form, expected):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert [record.value for record in stream_records("-", "--input", form)] == expected


def test_a_pipe_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=(b'"%d"\n' % i for i in itertools.count())))
    first = list(itertools.islice(stream_records("-", "--input"), 3))
    assert first == [Record("0", "stdin:1"), Record("1", "stdin:2"), Record("2", "stdin:3")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'["a"]\n{"b"\n', r"x.jsonl:2: broken JSON .*mend"),
        ("x.jsonl", b'["a"]\n\xff\n', "x.jsonl:2: not UTF-8 .*save"),
        ("x.txt", b"\xff", "x.txt:1: not UTF-8"),
        ("x.doc", b"a", "--input: .*unknown ending '.doc'"),
        ("x.json", b"[]", "--input: .*empty"),
    ],
)
def test_what_is_not_readable_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(stream_records(str(tmp_path / name), "--input"))


def test_a_file_that_is_not_there_is_named_before_anything_is_read(tmp_path):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"--input: .* does not exist or is no file; give"):
            stream_records(str(path), "--input")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["Hi", "Hello "], turns("Hi", "Hello")),
        ({"messages": turns("Hi", "Hello")}, turns("Hi", "Hello")),
        ({"prompt": "Hi", "response": ""}, turns("Hi", "")),
        ({"prompt": ["Hi", "Hello", "Bye"], "response": "Bye"}, turns("Hi", "Hello", "Bye", "Bye")),
        ("\n\nHuman: Hi\n\nAssistant: Hello", turns("Hi", "Hello")),
        ("A sentence.", "A sentence."),
        ({"text": "A sentence.", "id": 3}, "A sentence."),
        ({"text": "not this", "prompt": "Hi", "response": "Hello"}, turns("Hi", "Hello")),
    ],
    ids=json.dumps,
)
def test_dialogues_and_texts(value, expected):
    assert dialogue_or_text(value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["Hi"], "does not end in an answer"),
        ({"prompt": "Hi", "response": None}, "does not end in an answer"),
        (["Hi", "", "Bye", "Bye"], "an empty turn"),
        (["", "Hello"], "an empty turn"),
        (" ", "an empty turn"),
        ({"text": "\ud83d"}, "surrogate"),
        (3, "a number"),
        ({"text": 3}, "none of the keys"),
    ],
)
def test_what_cannot_be_scored(value, reason):
    with pytest.raises(BadRecord, match=reason):
        dialogue_or_text(value)
