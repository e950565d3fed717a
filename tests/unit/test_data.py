"""Every form of data that is read, what is cut off or dropped, and that it is said with file and line."""

import json

import pytest
from conftest import SAMPLES

from data.dialogues import load_dialogues
from data.formats.dialogue_forms import check_turns, parse_turns
from data.formats.records import BadRecord, read_records
from data.preferences import load_preferences
from data.prompts import load_prompts
from data.template import encode_dialogue, encode_prompt
from utils.tokenizer import load_tokenizer

HI = [{"role": "user", "content": "Hi"}]
HI_HELLO = [*HI, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model), "moss_en")


def write(file, records, lines=False):
    """`records` as a JSON list with one record a line, the first on line 2, or as JSON lines."""
    texts = [json.dumps(record, ensure_ascii=False) for record in records]
    file.write_text("\n".join(texts) if lines else "[\n" + ",\n".join(texts) + "\n]", encoding="utf-8")
    return str(file)


def prompts_of(path, tokenizer, max_tokens=1000, num_valid=0, seed=0):
    said = []
    train, valid = load_prompts(str(path), tokenizer, "moss_en", max_tokens, num_valid, seed, said.append)
    return train, valid, said


def test_the_samples_load_without_a_loss(tiny_model):
    for lang in ("en", "zh"):
        tokenizer, said = load_tokenizer(str(tiny_model), f"moss_{lang}"), []
        folder = SAMPLES / lang
        prompts = load_prompts(str(folder / "prompts"), tokenizer, f"moss_{lang}", 400, 0, 0, said.append)
        preferences = load_preferences(str(folder / "preferences"), 0, 0, said.append)
        dialogues = load_dialogues(str(folder / "dialogues"), 0, 0, said.append)
        assert [len(split) for split in (*prompts, *preferences, *dialogues)] == [24, 8, 14, 4, 14, 2]
        assert len(said) == 3  # one summary each; nothing dropped or cut
        for dialogue in dialogues[0]:
            assert any(encode_dialogue(tokenizer, dialogue.turns, f"moss_{lang}")[1])


@pytest.mark.parametrize(
    "record",
    [
        ["Hi"],
        ["Hi", "Hello"],
        {"messages": HI},
        {"messages": HI_HELLO},
        {"conversations": [{"from": "human", "value": " Hi "}]},
        {"instruction": "Hi", "input": ""},
        {"prompt": "Hi"},
        {"prompt": ["Hi"]},
        {"prompt": HI},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:"},
        {"prompt": "Hi", "response": "Hello"},
    ],
)
def test_prompt_forms(tmp_path, tokenizer, record):
    train, _, _ = prompts_of(write(tmp_path / "x.json", [record]), tokenizer)
    assert [prompt.turns for prompt in train] == [HI]
    assert train[0].ids == encode_prompt(tokenizer, HI, "moss_en")
    assert train[0].source == f"{tmp_path}/x.json:2"


@pytest.mark.parametrize(
    "record",
    [
        ["Hi", "Hello"],
        ["Hi", "Hello", "And?"],
        {"messages": HI_HELLO},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello"},
    ],
)
def test_dialogue_forms(tmp_path, record):
    said = []
    train, _ = load_dialogues(write(tmp_path / "x.jsonl", [record], lines=True), 0, 0, said.append)
    assert [dialogue.turns for dialogue in train] == [HI_HELLO]
    assert train[0].source == f"{tmp_path}/x.jsonl:1"
    assert ("question without an answer" in said[0]) == (record == ["Hi", "Hello", "And?"])


def test_alpaca_input_stands_below_the_instruction():
    turns = parse_turns({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert [turn["content"] for turn in turns] == ["Add.\n\n1 2", "3"]


def test_truncation_drops_the_oldest_exchanges_first_and_says_so(tmp_path, tokenizer):
    system = {"role": "system", "content": "Be kind."}
    texts = ["one " * 30, "two", "three", "four", "five"]
    spoken = [{"role": ("user", "assistant")[k % 2], "content": text.strip()} for k, text in enumerate(texts)]
    records = [["Hi"], {"messages": [system, *spoken]}, texts, ["six " * 200]]
    budget = len(encode_prompt(tokenizer, [system, *spoken[2:]], "moss_en"))
    train, _, said = prompts_of(write(tmp_path / "x.json", records), tokenizer, budget)
    assert [prompt.turns for prompt in train] == [HI, [system, *spoken[2:]], spoken[2:]]
    assert all(len(prompt.ids) <= budget for prompt in train)
    assert said[0] == f"prompts: 2 truncated (oldest turns dropped); first at {tmp_path}/x.json:3, then :4"
    reason = f"longer than --maxlen_prompt - --maxlen_res = {budget} tokens"
    assert said[1] == f"prompts: 1 dropped: {reason}; first at {tmp_path}/x.json:5"
    # One token less, and the next exchange goes as well.
    assert prompts_of(tmp_path / "x.json", tokenizer, budget - 1)[0][1].turns == [system, spoken[4]]


def test_cut_off_answers_are_counted(tmp_path, tokenizer):
    _, _, said = prompts_of(write(tmp_path / "x.json", [["a"], ["b", "c"], ["d", "e"]]), tokenizer)
    assert (
        said[0]
        == f"prompts: 2 ended in the assistant's answer, which was cut off; first at {tmp_path}/x.json:3, then :4"
    )


def test_validation_files_or_a_seeded_part(tmp_path, tokenizer):
    write(tmp_path / "a_train.json", [[f"a {i}"] for i in range(5)])
    write(tmp_path / "b_train.jsonl", [[f"b {i}"] for i in range(5)], lines=True)
    write(tmp_path / "notes.json", [["not read"]])
    train, valid, said = prompts_of(tmp_path, tokenizer, num_valid=3)
    texts = [prompt.turns[0]["content"] for prompt in (*train, *valid)]
    assert sorted(texts) == sorted([f"{name} {i}" for name in "ab" for i in range(5)])
    assert len(valid) == 3
    assert any("3 held out by seed 0" in line for line in said)
    assert prompts_of(tmp_path, tokenizer, num_valid=3)[1] == valid
    assert prompts_of(tmp_path, tokenizer, num_valid=3, seed=1)[1] != valid
    assert prompts_of(tmp_path, tokenizer, num_valid=0)[1] == []

    write(tmp_path / "a_valid.json", [["held out"]])
    train, valid, _ = prompts_of(tmp_path, tokenizer, num_valid=3)
    assert (len(train), len(valid)) == (10, 1)


def test_lines_of_records_in_a_free_layout(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('\ufeff[ {"prompt":\n "a"}, ["b"],\n\n\n["c\u2028"]\n,["d"]\n]\n', encoding="utf-8")
    records = read_records(str(file))[0]
    assert [record.source.rsplit(":", 1)[1] for record in records] == ["1", "2", "5", "6"]
    assert [record.value for record in records] == [{"prompt": "a"}, ["b"], ["c\u2028"], ["d"]]
    lines = tmp_path / "x.jsonl"
    lines.write_text('["a\u2028"]\r\n\r\n["b"]\n', encoding="utf-8")
    records = read_records(str(lines))[0]
    assert [(record.value, record.source[-1]) for record in records] == [(["a\u2028"], "1"), (["b"], "3")]


def test_tables_go_through_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"prompt": ["Hi", "Bye"], "response": ["Hello", "Ciao"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("prompt,response\nHi,Hello\nBye,Ciao\n")
    for name in ("x.parquet", "x.csv"):
        train, _ = load_dialogues(str(tmp_path / name), 0, 0, lambda _: None)
        assert [dialogue.turns[1]["content"] for dialogue in train] == ["Hello", "Ciao"]
        assert train[1].source == f"{tmp_path}/{name}[train]:2"


def test_hub_data_sets(monkeypatch):
    splits = {"train": [{"prompt": "a"}], "validation": [{"prompt": "b"}]}
    monkeypatch.setattr("datasets.load_dataset", lambda name: splits if name == "owner/set" else None)
    train, valid = read_records("owner/set")
    assert (train[0].value, train[0].source) == ({"prompt": "a"}, "owner/set[train]:1")
    assert valid[0].value == {"prompt": "b"}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no human turn"),
        ([("system", "x")], "no human turn"),
        ([("assistant", "x")], "the assistant speaks first"),
        ([("user", "x"), ("user", "y")], "two turns of the human in a row"),
        ([("user", "x"), ("assistant", "y"), ("assistant", "z")], "two turns of the assistant in a row"),
        ([("user", "x"), ("system", "y")], "a system turn that is not the first"),
        ([("user", " \n")], "an empty turn"),
        ([("system", ""), ("user", "x")], "an empty turn"),
        ([("user", "half \ud83d")], "half a surrogate pair"),
    ],
)
def test_turns_that_cannot_be_used(turns, reason):
    with pytest.raises(BadRecord, match=reason):
        check_turns([{"role": role, "content": content} for role, content in turns])
