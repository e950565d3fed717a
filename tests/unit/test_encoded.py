"""data/encoded.py, data/cache.py, data/order.py: lists and mapped files are alike; when a file is made again."""

import json
import multiprocessing
import os
import shutil
from collections import Counter
from itertools import pairwise

import pytest

from data import cache, encoded, order
from data.dialogues import DialogueEncoder
from data.encoded import EncodedSet, Mixture, load_encoded
from data.formats.columns import PLAIN, FormOptions
from data.prompts import PromptEncoder
from data.sources import Part
from reward.encode import ComparisonEncoder
from utils.errors import UserError
from utils.flags.data import RecordFlags
from utils.tokenizer import encode_texts, load_tokenizer

PAIRS = [
    {
        "prompt": f"Question {i}",
        "chosen": "yes " * (i % 40),
        "rejected": f"no {i}",
        "mean preference difference": i % 3 - 1,
    }
    for i in range(1, 1400)
]
PAIRS[6]["chosen"], PAIRS[600] = "long " * 300, {"prompt": "no answers"}
DIALOGUES = [["Hi", "Hello " * (i % 30 + 1), f"{i}?", "Yes."] for i in range(1300)]
DIALOGUES[3], DIALOGUES[1200] = ["a", ""], ["a", "b", "c"]
PROMPTS = [{"question": f"What is {i}?", "answer": str(i), "id": i} for i in range(1300)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model), "moss_en")


def kinds(tokenizer) -> dict[str, tuple[object, list]]:
    return {
        "prompts": (PromptEncoder(tokenizer, "moss_en", 60, PLAIN), PROMPTS),
        "dialogues": (DialogueEncoder(tokenizer, "moss_en", 60, PLAIN), DIALOGUES),
        "preferences": (ComparisonEncoder(tokenizer, "moss_en", 300, PLAIN, ("margin",)), PAIRS),
    }


def write(folder, records, name="x.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def loaded(file: str, encoder, config: RecordFlags) -> tuple[list, list, list[str]]:
    """(training items, held-out items, what was said)."""
    said = []
    train, valid = load_encoded([file], encoder, config, 20, 0, said.append)
    assert len(train) == sum(1 for _ in train.each("source"))
    return [train.sets[0][i] for i in range(len(train))], valid, said


@pytest.mark.parametrize(
    "kind",
    ["prompts", pytest.param("dialogues", marks=pytest.mark.slow), pytest.param("preferences", marks=pytest.mark.slow)],
)
def test_a_mapped_file_has_what_a_list_has(tmp_path, tokenizer, monkeypatch, kind):
    """Items, held-out items, counts and their places: cold, by another number of workers, and warm."""
    encoder, records = kinds(tokenizer)[kind]
    file, config = write(tmp_path, records), RecordFlags(data_cache=str(tmp_path / "cache"), data_workers=1)
    train, valid, said = loaded(file, encoder, config)
    assert len(valid) == 20 and len(train) > 1200 and not os.path.exists(tmp_path / "cache")
    monkeypatch.setattr(encoded, "SMALL", 0)
    for config.data_workers in (1,) if kind == "prompts" else (1, 2):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert loaded(file, encoder, config)[:2] == (train, valid)
    monkeypatch.setattr(cache, "_write", None)  # which would make it again
    again = loaded(file, encoder, config)
    assert again[:2] == (train, valid)
    assert [line for line in again[2] if "--data_cache" not in line] == said
    assert not multiprocessing.active_children()


def test_items_are_found_by_place_and_column(tokenizer):
    encoder = kinds(tokenizer)["prompts"][0]
    rows = [{"ids": [i], "turns": "[]", "source": str(i), "record_columns": "{}", "record": i // 2} for i in range(10)]
    items = EncodedSet(rows, encoder, [2, 3, 9])
    assert [item.source for item in items] == ["0", "1", "4", "5", "6", "7", "8"] and items[-1].source == "8"
    assert [item.source for item in items[1:6:2]] == ["1", "5", "7"]
    assert [row["source"] for row in items.each("source")] == ["0", "1", "4", "5", "6", "7", "8"]
    with pytest.raises(IndexError):
        items[7]
    assert encoded._rows_of(rows, [0, 3]) == [0, 1, 6, 7]


def test_a_file_is_made_again_when_something_that_it_depends_on_changes(tmp_path, tokenizer, monkeypatch, tiny_model):
    file = write(tmp_path, PAIRS[:3])

    def key(**changes) -> str:
        given = {"tokenizer": tokenizer, "template": "moss_en", "max_tokens": 60, "options": PLAIN}
        return cache._key([Part(file)], ComparisonEncoder(**given | changes))

    keys = [key(), key(max_tokens=61), key(template="chat"), key(options=FormOptions((("chosen", "good"),)))]
    keys += [key(margin_columns=("margin",)), cache._key([Part(file)], kinds(tokenizer)["prompts"][0])]
    other = load_tokenizer(str(tiny_model), "moss_zh")  # with its tags
    keys.append(key(tokenizer=other))
    other = load_tokenizer(str(tiny_model), "moss_en")
    assert key(tokenizer=other) == keys[0]  # the same, loaded again
    other.chat_template_kwargs = {"enable_thinking": False}
    keys.append(key(tokenizer=other))
    files = cache.code_files()
    monkeypatch.setattr(cache, "code_files", lambda: files | {"data/template.py": "0"})
    keys.append(key())
    monkeypatch.setattr(cache, "code_files", lambda: files | {"ppo/loss.py": "0"})
    assert key() == keys[0]
    write(tmp_path, PAIRS[:2])
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_tokenizers_with_other_ids_have_other_files(tmp_path, tiny_model):
    """Also if they differ only in the spaces that an added token takes, or are written in Python."""

    def sentencepiece(name: str, rstrip: bool):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_model, tmp_path / name / "tokenizer.model")
        token = {"content": "<|end|>", "rstrip": rstrip}
        number = len(load_tokenizer(str(tiny_model), "moss_en"))
        config = {"added_tokens_decoder": {number: token}}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(str(tmp_path / name), "moss_en")

    def in_python(name: str, last: str):
        (tmp_path / name).mkdir()
        config = {"tokenizer_class": "CTRLTokenizer", "eos_token": "<e>", "unk_token": "<unk>"}
        vocab = {"<unk>": 0, "<e>": 1, "Hello": 2, last: 3}
        for file, content in {"vocab.json": vocab, "tokenizer_config.json": config}.items():
            (tmp_path / name / file).write_text(json.dumps(content))
        (tmp_path / name / "merges.txt").write_text("#version\n")
        return load_tokenizer(str(tmp_path / name), "moss_en")

    for make, values in ((sentencepiece, (False, True)), (in_python, ("a", "b"))):
        first, same, other = (make(f"{make.__name__}{i}", values[i // 2]) for i in range(3))
        text = ["<|end|>   a"]
        assert encode_texts(first, text, False) != encode_texts(other, text, False)
        assert cache._tokenizer_digest(first) == cache._tokenizer_digest(same) != cache._tokenizer_digest(other)
        assert cache._tokenizer_digest(first) == cache._tokenizer_digest(same)  # asked again


def test_a_damaged_file_is_made_again(tmp_path, tokenizer, monkeypatch):
    encoder, records = kinds(tokenizer)["prompts"]
    file, config = write(tmp_path, records[:30]), RecordFlags(data_cache=str(tmp_path / "cache"), data_workers=1)
    rows = [{"ids": [1], "turns": "[]", "source": "x:1", "record_columns": "{}", "record": 0}]
    made = []

    def make(parts, encoder, config, say, path):
        import pyarrow

        with pyarrow.ipc.new_stream(path, pyarrow.schema([("record", "int64")])) as writer:
            writer.write_table(pyarrow.table({"record": [0]}))
        made.append(path)
        return {"usable": len(rows), "counts": {"reasons": [], "unread": []}, "bytes": os.path.getsize(path)}

    monkeypatch.setattr(cache, "_write", make)
    for damage in (None, "rows.arrow", "about.json", "about"):
        found = cache.encode_to_file([Part(file)], encoder, encoded.Tally("prompts"), config, str)
        folder = os.path.dirname(found.rows)
        if damage == "about":
            os.remove(os.path.join(folder, "about.json"))
        elif damage:
            with open(os.path.join(folder, damage), "r+b") as stream:
                stream.truncate(20)
    cache.encode_to_file([Part(file)], encoder, encoded.Tally("prompts"), config, str)
    assert len(made) == 4 and sorted(os.listdir(folder)) == ["about.json", "rows.arrow"]


@pytest.mark.slow
def test_errors_in_workers_end_with_their_place_and_leave_nothing(tmp_path, tokenizer, monkeypatch):
    encoder, records = kinds(tokenizer)["prompts"]
    config = RecordFlags(data_cache=str(tmp_path / "cache"), data_workers=2)
    monkeypatch.setattr(encoded, "SMALL", 0)
    file = write(tmp_path, records)
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    lines[1100] = '{"question": '
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"x.jsonl:1101: broken JSON"):
        loaded(file, encoder, config)
    assert not multiprocessing.active_children() and os.listdir(tmp_path / "cache") == []
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="--data_cache"):
        loaded(file, encoder, config)


def test_the_order_of_many_items_is_a_permutation_without_a_list(monkeypatch):
    monkeypatch.setattr(order, "MAX_SHUFFLED", 100)
    for size in (101, 1000, 4097):
        run = order.order(0, 2 * size, size, seed=5)
        assert sorted(run[:size]) == sorted(run[size:]) == list(range(size))
        assert run[:size] != run[size:] and order.order(size, 3, size, 5) == run[size : size + 3]
        assert order.order(0, 20, size, 6) != run[:20]
    halves = Counter(index < 2048 for index in order.order(0, 2000, 4097, 0))
    assert 850 < halves[True] < 1150  # binomial: 1000, and 31 of a deviation
    steps = Counter((b - a) % 4097 for a, b in pairwise(run))
    assert max(steps.values()) < 12  # no two neighbours keep their distance


def test_a_mixture_takes_shares_of_its_sets():
    mixed = Mixture([["a"] * 3, ["b"] * 5], [3, 1], seed=1)
    assert Counter(mixed.take(0, 1000)) == {"a": 750, "b": 250}
    assert mixed.take(400, 100) == mixed.take(0, 1000)[400:500]
    assert len(mixed) == 8 and mixed.first(4) == ["a", "a", "a", "b"]
    assert sorted(Mixture([["a"], ["b", "c"]], None, seed=1).take(0, 3)) == ["a", "b", "c"]
