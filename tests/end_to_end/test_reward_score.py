"""reward.score on tiny reward models: files, a pipe, several models, two files of answers, bad input."""

import json
import re
import statistics
import subprocess
import sys

import pytest
import torch

from data.template import encode_dialogue, encode_text
from reward.model import load_scalar_model, save_scalar_model
from reward.score import main
from tests.tiny import tiny_llama_folder, tiny_tokenizer_folder
from tests.tiny_run import REPOSITORY, SIZES, clean_environment, read_lines, write_json
from utils.tokenizer import load_tokenizer

CPU = torch.device("cpu")
RECORDS = [
    ["Why is the sky blue?", "Because air scatters blue light more than red light."],
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "id": 7},
    {"prompt": "Name a tree.", "response": "", "score": "of someone else"},
    {"prompt": ["Hi", "Hello", "Name a bird."], "response": "A wren."},
    "A text that is no dialogue.",
    {"prompt": "Name a tree."},
]
REASON = "it does not end in an answer of the assistant"


@pytest.fixture(scope="module")
def models(inputs, tmp_path_factory):
    """(a reward model with the tokenizer of the others, one with its own)."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_llama_folder(folder / "base", 370, seed=9, tokenizer=False, **SIZES)
    tokenizer = load_tokenizer(str(tiny_tokenizer_folder(folder / "tokenizer", 370)), "moss_en")
    model = load_scalar_model(str(base), torch.float32, CPU, say=str)
    save_scalar_model(model, str(folder / "other"), tokenizer=tokenizer)
    tiny_tokenizer_folder(inputs.reward)
    return inputs.reward, folder / "other"


def by_hand(path, value) -> float:
    tokenizer, model = load_tokenizer(str(path), "moss_en"), load_scalar_model(str(path), torch.float32, CPU)
    texts = value if isinstance(value, list) else [*value["prompt"], value["response"]] if "prompt" in value else None
    if isinstance(value, str):
        ids = encode_text(tokenizer, value)
    elif texts is None:
        ids, _ = encode_dialogue(tokenizer, value["messages"], "moss_en")
    else:
        turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
        ids, _ = encode_dialogue(tokenizer, turns, "moss_en")
    with torch.no_grad():
        return float(model(torch.tensor([ids]), torch.ones(1, len(ids)).bool())[0, -1])


def write_lines(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def expected(models) -> list[list[float]]:
    """A row a record that can be scored, a column a model."""
    asked = [record if i != 2 else {"prompt": ["Name a tree."], "response": ""} for i, record in enumerate(RECORDS[:5])]
    return [[by_hand(path, value) for path in models] for value in asked]


def test_a_file_and_the_order_of_its_records(models, expected, tmp_path, capsys):
    source, out = write_lines(tmp_path / "x.jsonl", RECORDS), tmp_path / "sub" / "scored.jsonl"
    flags = ["--dtype", "fp32", "--chunk_size", "4", "--micro_batch_tokens", "60"]
    main(["--model", str(models[0]), "--input", source, "--output", str(out), *flags])
    rows = read_lines(out)
    assert [row["score"] for row in rows[:5]] == pytest.approx([row[0] for row in expected], abs=1e-5)
    assert rows[0]["messages"][1]["content"] == RECORDS[0][1]
    assert rows[1] == RECORDS[1] | {"score": rows[1]["score"]}
    assert rows[4].keys() == {"text", "score"}
    assert rows[5] == {"prompt": "Name a tree.", "score": None, "error": REASON}
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"records: 1 not scored: {REASON}; first at {source}:6" in shown.err
    assert not list(out.parent.glob("*.partial"))
    again = tmp_path / "again.jsonl"
    main(["--model", str(models[0]), "--input", str(out), "--output", str(again), *flags])  # what it wrote, it reads
    assert read_lines(again)[:5] == [row | {"score": pytest.approx(row["score"], abs=1e-5)} for row in rows[:5]]


def test_several_models_and_a_column(models, expected, tmp_path, capsys):
    source = write_lines(tmp_path / "x.jsonl", RECORDS)
    flags = ["--dtype", "fp32", "--column", "r", "--offload_frozen"]
    main(["--model", *map(str, models), "--input", source, *flags])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, scores in zip(rows[:5], expected, strict=True):
        assert row["rs"] == pytest.approx(scores, abs=1e-5)
        assert (row["r"], row["r_std"]) == pytest.approx((sum(scores) / 2, abs(scores[0] - scores[1]) / 2), abs=1e-5)
    assert rows[2]["score"] == "of someone else"
    assert rows[5]["r"] is None


def test_a_pipe(models, expected):
    """Results come while the input is still open, alone on standard output; a reader who has seen enough may leave."""
    command = [sys.executable, "-m", "reward.score", "--model", str(models[0]), "--input", "-", "--dtype", "fp32"]
    text = "".join(json.dumps(record) + "\n" for record in RECORDS)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [*command, "--chunk_size", str(len(RECORDS))], cwd=REPOSITORY, env=clean_environment(), **pipes
    ) as process:
        process.stdin.write(text)
        process.stdin.flush()
        scores = [json.loads(process.stdout.readline())["score"] for _ in RECORDS]
        process.stdout.close()
        _, error = process.communicate(text * 2, timeout=150)
    assert scores[:5] == pytest.approx([row[0] for row in expected], abs=1e-5) and scores[5] is None
    assert process.returncode == 0
    assert "Traceback" not in error and "Exception ignored" not in error


ANSWERS = (["Oak.", "Blue.", "Two", "Yes", "No"], ["Oak.", "I do not know.", "It is three", "", "Well, that depends"])
QUESTIONS = ["Name a tree.", "Which colour?", "How many?", "Really?", "Do you know?"]


def answers(tmp_path, **changes) -> list[str]:
    """Two files of answers to the questions."""
    files = []
    for name, column in zip(("a", "b"), ANSWERS, strict=True):
        records = [{"prompt": q, "response": r} for q, r in zip(QUESTIONS, column, strict=True)]
        files.append(write_lines(tmp_path / f"{name}.jsonl", changes.get(name, records)))
    return files


def test_comparison_of_two_files(models, tmp_path, capsys):
    files, out = answers(tmp_path), tmp_path / "new" / "table.json"
    differences = []
    for question, *pair in zip(QUESTIONS, *ANSWERS, strict=True):
        scores = [[by_hand(path, [question, answer]) for path in models] for answer in pair]
        differences.append(statistics.fmean(scores[0]) - statistics.fmean(scores[1]))
    margin = sorted(map(abs, differences))[2] + 1e-4  # the third closest is a tie too
    flags = ["--dtype", "fp32", "--tie_margin", str(margin), "--chunk_size", "2", "--output", str(out)]
    main(["--model", *map(str, models), "--compare", *files, *flags])
    table = json.loads(out.read_text())
    wins, losses = (sum(sign * d > margin for d in differences) for sign in (1, -1))
    assert wins + losses == 2
    assert (table["win"][0], table["tie"][0], table["lose"][0]) == (wins / 5, 3 / 5, losses / 5)
    low, high = table["tie"][1:]
    assert (low, high) == pytest.approx((0.2307, 0.8824), abs=1e-4)  # Wilson, 3 of 5
    shown = capsys.readouterr().out
    assert re.search(r"5 prompts.*\n.*\ntie +3 +60.0 %   \[23.1, 88.2\]\n", shown)


def test_comparison_by_scores_that_are_there(tmp_path, capsys):
    rows = [
        [{"prompt": q, "response": "x", "score": s} for q, s in zip(QUESTIONS, c)] for c in ([3, 2, 1], [1, 2, 3.5])
    ]
    main(["--compare", *answers(tmp_path, a=rows[0], b=rows[1])])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:4]] == ["1", "1", "1"]


def refused(argv, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, argv)))
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    error = shown.err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "Traceback" not in shown.err
    return error


FLAGS = {
    "nothing to do": (["--model", "m"], "give --input FILE .* or --compare"),
    "both": (["--input", "a", "--compare", "a", "b"], "give --input FILE .* or --compare"),
    "no model": (["--input", "a.jsonl"], "--model is missing"),
    "a model twice": (["--input", "a.jsonl", "--model", "m", "m"], "--model names m twice"),
    "three files": (["--compare", "a", "b", "c"], "--compare takes two files"),
    "no such file": (["--input", "/nowhere.jsonl", "--model", "m"], "--input: /nowhere.jsonl does not exist.*give"),
    "no such model": (["--input", "X", "--model", "/nowhere"], "--model: .*/nowhere does not exist; give"),
    "tie margin": (["--compare", "X", "X", "--tie_margin", "-1"], "--tie_margin -1: give a number at least 0"),
    "chunks of nothing": (["--input", "X", "--model", "m", "--chunk_size", "0"], "--chunk_size 0: give"),
    "input as output": (["--input", "X", "--model", "m", "--output", "X"], "--output .* is read here: give another"),
    "below a file": (["--input", "X", "--model", "m", "--output", "X/y"], "--output .* cannot be written.*choose"),
    "no chat template": (["--input", "X", "--model", "R", "--template", "chat"], "--template chat.*no chat template"),
    "no scores": (["--compare", "X", "X"], "x.jsonl:1: no number under 'score'; give --model"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags(models, tmp_path, capsys, case):
    argv, pattern = FLAGS[case]
    names = {"X": write_lines(tmp_path / "x.jsonl", RECORDS[:1]), "R": str(models[0])}
    names["X/y"] = f"{names['X']}/y"
    assert re.search(pattern, refused([names.get(word, word) for word in argv], capsys))


INPUT = {
    "broken JSON": ('["a", "b"]\n["a"\n', "x.jsonl:2: broken JSON .*mend"),
    "nothing": ("\n", "--input .*nothing in it could be scored .it is empty.; mend"),
    "nothing to score": ('["a"]\n3\n', f"--input .*nothing in it.*1 not scored: {REASON}; first at .*x.jsonl:1"),
}


@pytest.mark.parametrize("case", INPUT)
def test_bad_input_leaves_no_output(models, tmp_path, capsys, case):
    content, pattern = INPUT[case]
    (tmp_path / "x.jsonl").write_text(content)
    out = tmp_path / "out" / "scored.jsonl"
    assert re.search(pattern, refused(["--model", models[0], "--input", tmp_path / "x.jsonl", "--output", out], capsys))
    assert not out.exists() and not list(out.parent.glob("*"))


ASKED = {"prompt": "Hi", "response": "Hello"}
FILES = {
    "another prompt": (
        {"b": [ASKED, ASKED | {"prompt": "Bye"}]},
        "b.jsonl:2: another prompt than in .*a.jsonl:2; give",
    ),
    "one longer": ({"b": [ASKED]}, "a.jsonl:2: .*b.jsonl has no answer to it; give"),
    "no answer": ({"a": [ASKED, {"prompt": "Hi"}]}, f"a.jsonl:2: {REASON}; mend"),
    "texts": ({"a": [ASKED, "Hello"]}, "a.jsonl:2: a text without a prompt; give"),
    "empty": ({"a": [], "b": []}, "--compare: .*a.jsonl is empty; give"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_do_not_match(models, tmp_path, capsys, case):
    changes, pattern = FILES[case]
    files = answers(tmp_path, **({"a": [ASKED] * 2, "b": [ASKED] * 2} | changes))
    assert re.search(pattern, refused(["--model", models[0], "--compare", *files], capsys))


def test_models_of_different_meanings_are_not_averaged(models, tmp_path, capsys):
    folder = tmp_path / "toxicity"
    folder.mkdir()
    for file in models[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write_json(
        folder / "config.json", json.loads((folder / "config.json").read_text()) | {"id2label": {"0": "toxicity"}}
    )
    source = write_lines(tmp_path / "x.jsonl", RECORDS)
    error = refused(["--model", models[0], folder, "--input", source], capsys)
    assert re.search(r"--model: the scores of .*/toxicity mean toxicity .*, those of .*: give", error)
