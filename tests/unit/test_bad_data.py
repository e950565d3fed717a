"""Bad data files: each stops with one line that names flag or file:line, or is counted record by record."""

import json
from datetime import datetime

import pytest

from data.dialogues import load_dialogues
from data.formats.json_lines import json_line
from data.formats.records import read_records
from data.preferences import load_preferences
from data.prompts import load_prompts
from utils.errors import UserError
from utils.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[\n["a"],\n["b"\n', "x.json:4: broken JSON"),
        ("x.json", b'[["a"],\n["b"}]', "x.json:2: broken JSON"),
        ("x.json", b'[["a"]\n["b"]]', r"x.json:2: broken JSON \(expected ',' or '\]'"),
        ("x.json", b'[["a"],\n]', "x.json:2: broken JSON"),
        ("x.json", b'[["a"]]\n[["b"]]', "x.json:1: broken JSON .something follows"),
        ("x.json", b'[["a"]', "x.json:1: broken JSON"),
        ("x.json", b"[", "x.json:1: broken JSON"),
        ("x.json", b'{"prompt": "a"}\n', r"x.json:1: expected a list.*\.jsonl"),
        ("x.json", b"nonsense", "x.json:1: expected a list"),
        ("x.json", b"[" * 200000, "x.json:1: broken JSON"),
        ("x.json", b"[" + b"1" * 10000 + b"]", "x.json:1: broken JSON"),
        ("x.json", b'[\n["caf\xe9"]]', "x.json:2: not UTF-8"),
        ("x.json", b"", "--data_path.*empty"),
        ("x.json", b" \n", "--data_path.*empty"),
        ("x.json", b"[ ]", "--data_path.*empty"),
        ("x.jsonl", b"\n\n", "--data_path.*empty"),
        ("x.jsonl", b'["a"]\n\n{"prompt": \n', "x.jsonl:3: broken JSON"),
        ("x.jsonl", b'["a"]\n\xff', "x.jsonl:2: not UTF-8"),
        ("x.txt", b"hello", "--data_path.*ending '.txt'"),
        ("x.parquet", b"not parquet", "--data_path.*cannot load"),
    ],
)
def test_files_that_stop_the_run(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_records(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("[]")

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # root may read everything, so chmod shows nothing
    with pytest.raises(UserError, match=r"--data_path: cannot read .*x.json: Permission denied"):
        read_records(str(tmp_path / "x.json"))


@pytest.mark.parametrize("path", ["/nowhere", "nowhere", "data/nowhere", "some/nowhere.json"])
def test_missing_paths_stay_local(path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(UserError, match=r"--data_path: .*does not exist"):
        read_records(path)


def test_hub_offline_and_hub_without_a_train_split(monkeypatch):
    def offline(_):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError, match=r"--data_path: cannot load owner/set \(no route\)"):
        read_records("owner/set")
    monkeypatch.setattr("datasets.load_dataset", lambda _: {"test": []})
    with pytest.raises(UserError, match="no split called train, only test"):
        read_records("owner/set")


def test_folders_without_training_files(tmp_path):
    with pytest.raises(UserError, match=r"--data_path: no .train.json.*no JSON files at all"):
        read_records(str(tmp_path))
    (tmp_path / "valid.json").write_text('[["a"]]')
    with pytest.raises(UserError, match=r"--data_path: no .train.json.*valid.json"):
        read_records(str(tmp_path))


BAD_RECORDS = [
    "a bare string",
    3,
    None,
    [],
    [""],
    ["a", 3],
    {},
    {"text": "a"},
    {"messages": "a"},
    {"messages": [{"role": "tool", "content": "a"}]},
    {"messages": [{"role": ["user"], "content": "a"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": 3}]},
    {"conversations": [{"from": "gpt", "value": "a"}]},
    {"instruction": None},
    {"instruction": "a", "input": 3},
    {"prompt": 3},
    {"prompt": "a", "response": 3},
    {"prompt": "Human: a\n\nHuman: b"},
    ["half \ud83d"],
]


@pytest.mark.parametrize("record", BAD_RECORDS, ids=repr)
def test_bad_records_are_counted_and_the_rest_is_used(tmp_path, tiny_model, record):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(["fine", "good"]) + "\n" + (json.dumps(record) + "\n") * 2)
    for load in (
        lambda say: load_prompts(str(file), load_tokenizer(str(tiny_model)), "moss_en", 99, 0, 0, say),
        lambda say: load_dialogues(str(file), 0, 0, say),
    ):
        said = []
        train, _ = load(said.append)
        assert len(train) == 1
        assert any(": 2 dropped: " in line and line.endswith("x.jsonl:2, then :3") for line in said), said


def test_nothing_left(tmp_path, tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    file = tmp_path / "train.json"
    file.write_text('[["much too long"], [""]]')
    with pytest.raises(UserError, match=r"--data_path .*no usable prompts left .*1 dropped: longer than .* = 4 tokens"):
        load_prompts(str(file), tokenizer, "moss_en", 4, 0, 0, lambda _: None)
    with pytest.raises(UserError, match=r"no usable dialogues left .*no answer of the assistant"):
        load_dialogues(str(file), 0, 0, lambda _: None)
    with pytest.raises(UserError, match=r"no usable preferences left"):
        load_preferences(str(file), 0, 0, lambda _: None)
    file.write_text('[["a"]]')
    (tmp_path / "valid.json").write_text('[[""]]')
    with pytest.raises(UserError, match=r"left for validation .*an empty turn.*valid.json:1"):
        load_prompts(str(tmp_path), tokenizer, "moss_en", 99, 0, 0, lambda _: None)


def test_too_few_to_hold_out(tmp_path, tiny_model):
    file = tmp_path / "train.json"
    file.write_text('[["a"], ["b"]]')
    with pytest.raises(UserError, match="2 usable prompts are too few to hold out 2"):
        load_prompts(str(file), load_tokenizer(str(tiny_model)), "moss_en", 99, 2, 0, lambda _: None)


def test_every_record_can_be_written_again():
    """Half a surrogate pair, as JSON's escapes bring it, and what only a .parquet file can hold."""
    value = {"text": "你好", "half": "\ud83d", "when": datetime(2026, 1, 2), "lines": "a\nb"}
    line = json_line(value)
    line.encode()
    assert line.count("\n") == 1
    assert json.loads(line) == value | {"when": "2026-01-02 00:00:00"}


def test_an_integer_that_no_float_can_hold(tmp_path):
    pair = '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": %s}\n'
    file, said = tmp_path / "x.jsonl", []
    file.write_text(pair % 1 + pair % ("1" + "0" * 400) + pair % "1e999" + pair % "NaN")
    train, _ = load_preferences(str(file), 0, 0, said.append, ("margin",))
    assert len(train) == 1
    assert f"preferences: 3 dropped: margin is not a finite number; first at {file}:2, then :3, :4" in said


def test_blank_lines_before_a_list_count_too(tmp_path):
    (tmp_path / "x.json").write_text('\n\n[["a"],\n["b"]]')
    records, _ = read_records(str(tmp_path / "x.json"))
    assert [record.source.rpartition(":")[2] for record in records] == ["3", "4"]
