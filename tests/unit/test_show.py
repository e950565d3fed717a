"""data.show: what is printed of tiny data is counted by hand; texts of the data stay texts."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.show import ShowConfig, main
from data.showing.counts import bins, overlap, quantile, repeated
from data.showing.items import shape
from data.showing.pages import Section, to_text
from data.showing.pieces import Piece, token_pieces, turn_pieces
from data.showing.report import report
from data.template import encode_dialogue, encode_prompt
from tests.helpers.families import FAMILIES, family_tokenizer
from utils.tokenizer import load_tokenizer

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e"
PAIRS = [
    {"prompt": "Why?", "chosen": "Because it is.", "rejected": "No", "id": 1},
    {"prompt": "How?", "chosen": "So", "rejected": "S o"},
    {"prompt": "Why?", "chosen": "Because it is.", "rejected": "No", "id": 2},
    {"prompt": "Why?", "chosen": "It is so.", "rejected": "Never mind"},
    {"prompt": "What?", "chosen": "Same", "rejected": "Same"},
]
HELD_OUT = [
    {"prompt": "How?", "chosen": "So", "rejected": "S o"},
    {"prompt": "Why?", "chosen": "Another one", "rejected": "No"},
    {"prompt": "Where?", "chosen": "Here", "rejected": "There"},
]


def written(folder, name: str, rows: list):
    file = folder / name
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def show(capsys):
    """Runs the command and gives what it prints, white space as single spaces."""

    def run(*words) -> str:
        main([str(word) for word in words])
        return re.sub(r"[ \n]+", " ", capsys.readouterr().out)

    return run


@pytest.fixture
def pairs(tmp_path):
    written(tmp_path, "data/train.jsonl", PAIRS)
    written(tmp_path, "data/valid.jsonl", HELD_OUT)
    return tmp_path / "data"


def test_pairs_are_counted(pairs, show):
    said = show("--data_path", pairs, "--num_records", 1, "--batch_size", 2)
    assert "used as preferences (the first 5 records are: 4 preferences, 1 prompts; --kind sets it)" in said
    # 4 of 5 usable; characters: prompt 4, then both answers: (18 + 6) + (6 + 7) + (18 + 6) + (13 + 14)
    assert f"{pairs} train 5 4 0 88 56 2" in said
    assert f"{pairs} held out 3 3 0 {(6 + 7) + (15 + 6) + (10 + 11)} {2 + 3 + 11 + 2 + 4 + 5}" in said
    assert f"1 dropped: chosen and rejected are the same answer; first at {pairs}/train.jsonl:5" in said
    for what, number, example in [
        ("records that repeat the prompt of an earlier one", 2, ":3 as {0}/train.jsonl:1; {0}/train.jsonl:4 as {0}/"),
        ("records that repeat prompt and answer of an earlier one", 1, ":3 as {0}/train.jsonl:1)"),
    ]:
        assert f"{what}: {number} ({pairs}/train.jsonl{example.format(pairs)}" in said
    for what, number, example in [
        ("held-out records with the prompt of training data", 2, "1 as {0}/train.jsonl:2; {0}/valid.jsonl:2 as {0}/"),
        ("held-out records with prompt and answer of training data", 1, "1 as {0}/train.jsonl:2)"),
    ]:
        assert f"{what}: {number} ({pairs}/valid.jsonl:{example.format(pairs)}" in said
    # +12, -1, +12, -1 and in the held-out data -1, +9, -1
    assert "chosen minus rejected: +4.1 characters on average; chosen is longer in 42.9% of 7 pairs" in said
    assert "pairs whose answers differ in white space only: 2" in said
    assert "this record: not read: id" in said
    assert said.count(f"{pairs}/train.jsonl:1 record: {{prompt: text, chosen: text, rejected: text, id: number}}") == 1
    # the longest side of each: 18, 7, 18, 13 and 7, 15, 10 characters
    assert " 4–7 " in said and re.search(r"8–15 █+ 3 42.9% 16–31 █+ 2 28.6% Checks", said)
    assert f"chosen and rejected (keys chosen, prompt, rejected): 5, first at {pairs}/train.jsonl:2" in said


def test_max_records_ends_the_reading(pairs, show):
    said = show("--data_path", pairs, "--max_records", 2, "--num_records", 0)
    assert f"{pairs} train 2 2 0 37" in said and f"{pairs} held out 2 2" in said
    assert "records that repeat the prompt of an earlier one: 0" in said


def test_several_sources_are_counted_one_by_one(tmp_path, show):
    first = written(tmp_path, "a.jsonl", [["Why?", "So."], ["How?", "Thus."]])
    second = written(tmp_path, "b.jsonl", [{"messages": [{"role": "user", "content": "Why?"}]}, ["Why?", "So."]])
    said = show("--data_path", first, 0.75, second, 0.25, "--kind", "dialogues")
    assert f"{first} train 0.75 2 2 0 16 8" in said and f"{second} train 0.25 2 1 0 7 3" in said
    assert f"the prompt of an earlier one: 1 ({second}:2 as {first}:1)" in said
    assert f"dropped: no answer of the assistant; first at {second}:1" in said


def test_tokens_are_marked(tmp_path, tiny_model, show):
    file = written(tmp_path, "x.jsonl", [["What is it?", "It is 7."], ["x", "y", "z" * 400, "end"]])
    said = show("--data_path", file, "--tokenizer_name_or_path", tiny_model, "--context_truncate", 200)
    assert "‹<s>›·Human:What·is·it?‹</s>›·Assistant:⟦It·is·7.‹</s>›⟧" in said
    ids, mask = encode_dialogue(load_tokenizer(str(tiny_model), "moss_en"), [
        {"role": ("user", "assistant")[k], "content": text} for k, text in enumerate(("What is it?", "It is 7."))
    ], "moss_en")  # fmt: skip
    assert f"tokens: {len(ids)} " in said and "longer than --context_truncate 200: 1 (50.0%)" in said
    assert "1 dropped: the last exchange alone exceeds --context_truncate" in said
    assert f"{file} train 2 1 0 {len(ids)} {sum(mask)}" in said


def test_tokens_of_pairs(tmp_path, tiny_model, show):
    rows = [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No"},
        {"prompt": "Why?", "chosen": "x" * 90, "rejected": "n"},
    ]
    file, tokenizer = written(tmp_path, "x.jsonl", rows), load_tokenizer(str(tiny_model), "moss_en")
    said = show("--data_path", file, "--tokenizer_name_or_path", tiny_model, "--context_truncate", 40)
    question = {"role": "user", "content": "Why?"}
    prompt = len(encode_prompt(tokenizer, [question], "moss_en"))
    whole = [
        len(encode_dialogue(tokenizer, [question, {"role": "assistant", "content": text}], "moss_en")[0])
        for text in ("So.", "No")
    ]
    assert f"tokens: {whole[0]}, {whole[1]} ‹<s>›·Human:Why?‹</s>›·Assistant: chosen │ rejected ⟦So.‹</s>›⟧" in said
    assert f"{file} train 2 1 0 {sum(whole)} {sum(whole) - 2 * prompt} 0" in said
    assert f"1 dropped: the last exchange alone exceeds --context_truncate; first at {file}:2" in said


def test_old_turns_that_are_cut_off_are_counted(tmp_path, tiny_model, show):
    file = written(tmp_path, "x.jsonl", [["long " * 40, "a", "Why?", "So."]])
    said = show("--data_path", file, "--tokenizer_name_or_path", tiny_model, "--context_truncate", 60)
    assert f"truncated (oldest turns dropped) to --context_truncate; first at {file}:1" in said
    assert re.search(rf"{file} train 1 1 1 \d\d \d 0", said) and "‹<s>›·Human:Why?‹</s>›·Assistant:⟦So" in said
    assert "longer than --context_truncate 60: 1 (100.0%)" in said


def test_where_the_answer_of_a_prompt_begins(tmp_path, chat_folder, show):
    file = written(tmp_path, "x.jsonl", [["Is 👍🏽 a word?"], ["Why?", "So.", "Then?"]])
    said = show("--data_path", file, "--tokenizer_name_or_path", chat_folder, "--template", "chat")
    start = "‹<|im_start|>›user↵ Is·👍🏽·a·word?‹<|im_end|>›↵ ‹<|im_start|>›assistant↵ ⟦(the answer begins here)⟧"
    assert start in said


def test_pieces_are_the_ids(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model), "moss_en")
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "你好 龘  two\n😀"}], "moss_en")
    pieces = token_pieces(tokenizer, (ids, [False] * len(ids)))
    assert [i for piece in pieces for i in piece.ids] == ids
    assert "".join(piece.text for piece in pieces) == "<s>·Human:你好·龘··two↵\n😀</s>·Assistant:"


def test_the_page_has_texts_and_no_code(tmp_path, show):
    row = {"prompt": HOSTILE, "chosen": f"yes {HOSTILE}", "rejected": "no", HOSTILE: 1}
    file = written(tmp_path, "x.jsonl", [row, {"prompt": HOSTILE, "chosen": "a", "rejected": "a"}])
    assert "written:" in show("--data_path", file, "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 3
    assert 'content="default-src &#x27;none' in page or "content=\"default-src 'none'" in page


def test_printed_text_has_no_control_characters(tmp_path, show):
    row = {"prompt": HOSTILE, "chosen": f"yes {HOSTILE}", "rejected": "no", HOSTILE: 1}
    said = show("--data_path", written(tmp_path, "x.jsonl", [row]))
    assert "\\u001b[31m\\u202e" in said and "\x1b" not in said


FORMS = sorted((Path(__file__).parents[1] / "data_forms").glob("*/*"))
BOTH = {"oasst_trees", "unpaired"}  # a tree is a preference and a dialogue; answers with a label are dialogues


def test_the_kind_of_every_published_form_is_found():
    for file in FORMS:
        sections, problem = report(ShowConfig(data_path=[str(file)]))
        assert not problem
        assert sections[0].lines[0].startswith(f"used as {file.parent.name} ") or file.name.split(".")[0] in BOTH, file
        assert not any("single column" in line for line in sections[2].lines), file
    assert len(FORMS) > 50


def test_nothing_usable_is_an_error_after_the_reasons(tmp_path, capsys):
    file = written(tmp_path, "x.jsonl", [{"wrong": 3}, 3])
    with pytest.raises(SystemExit) as stopped:
        main(["--data_path", str(file)])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and re.match(rf"error: --data_path {file}: no usable \w+.*--columns", err)
    assert '{"wrong": 3}' in out and f"first at {file}:1" in out


def test_unknown_records_that_look_like_pairs(tmp_path, capsys):
    file = written(tmp_path, "x.jsonl", [{"quest": "Why?", "better_one": 3}])
    with pytest.raises(SystemExit):
        main(["--data_path", str(file)])
    assert "no usable preferences" in capsys.readouterr().err


def test_rewritten_answers_are_counted(tmp_path, show):
    family_tokenizer(FAMILIES["Qwen 3"]).save_pretrained(tmp_path / "qwen")
    thought = "<think>\nHm.\n</think>\n\n"
    file = written(tmp_path, "x.jsonl", [["Why?", f"{thought}So.", "Then?", f"{thought}No."]])
    said = show("--data_path", file, "--tokenizer_name_or_path", tmp_path / "qwen")
    assert "dialogues: 1 with earlier answers that the template rewrites" in said


def test_colours_and_columns():
    sides = [("chosen", [Piece("Q ", ids=(1,)), Piece("你好" * 30, True, ids=(2,)), Piece("</s>", True, True, (3,))])]
    sides.append(("rejected", [Piece("Q ", ids=(1,)), Piece("no", True, ids=(4,))]))
    lines = to_text([Section("x:1", [], sides=sides, level=3)], 83, colour=True).split("\n")
    assert lines[2] == "\x1b[38;5;241mQ \x1b[0m"
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert plain[3] == f"{'chosen':40} │ rejected"
    assert plain[4] == f"{'你好' * 10} │ no" and plain[7].startswith("</s>")
    assert "\x1b[7;38;5;34m</s>\x1b[0m" in lines[7]


def test_numbers_of_hashes():
    hashes = np.array([5, 0, 7, 5, 0, 7, 5], np.uint64)
    assert repeated(hashes) == (3, [(0, 3), (2, 5), (0, 6)])
    assert overlap(hashes, np.array([0, 7, 9, 5], np.uint64)) == (2, [(2, 1), (0, 3)])
    assert repeated(np.zeros(0, np.uint64)) == (0, [])


def test_lengths():
    lengths = Counter({1: 1, 3: 2, 4: 1, 9: 4, 100: 2})
    assert [quantile(lengths, share) for share in (0.1, 0.2, 0.5, 0.8, 0.95)] == [1, 3, 9, 9, 100]
    assert [size for _, size in bins(lengths)] == [1, 2, 1, 4, 0, 0, 2]
    assert [name for name, _ in bins(lengths)][:4] == ["1–1", "2–3", "4–7", "8–15"]


def test_shapes():
    value = {"messages": [{"role": "user", "content": "x"}, {"role": "a", "content": "y"}], "n": 1, "b": None}
    assert shape(value) == "{messages: [{role: text, content: text}], n: number, b: null}"
    assert shape([["x"], 3]) == "[[text], number]"


def test_long_texts_are_shortened():
    from data.showing.items import Item

    pieces = turn_pieces(Item("prompts", [{"role": "user", "content": "a" * 9000}]))
    assert pieces[1].text == " " + "a" * 4000 + " … 1000 characters … " + "a" * 4000
