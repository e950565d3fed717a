"""reward.score on tiny reward models: files, a pipe, several models, two files of answers."""

import json
import re
import select
import statistics
import subprocess
import sys

import pytest
import torch

from data.formats.dialogue_forms import parse_turns
from data.template import encode_dialogue, encode_text
from reward.model import load_scalar_model, save_scalar_model
from reward.score import main
from tests.helpers.tiny import tiny_llama_folder, tiny_tokenizer_folder
from tests.helpers.tiny_run import REPOSITORY, SIZES, clean_environment, read_lines
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
    """The score of a text or of a dialogue."""
    tokenizer, model = load_tokenizer(str(path), "moss_en"), load_scalar_model(str(path), torch.float32, CPU)
    if isinstance(value, str):
        ids = encode_text(tokenizer, value)
    else:
        ids, _ = encode_dialogue(tokenizer, parse_turns(value, empty_answer=True), "moss_en")
    with torch.no_grad():
        return float(model(torch.tensor([ids]), torch.ones(1, len(ids)).bool())[0, -1])


def write_lines(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def expected(models) -> list[list[float]]:
    """A row per record that can be scored, a column per model."""
    return [[by_hand(path, value) for path in models] for value in RECORDS[:5]]


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
    assert shown.out == "" and f"records: 1 not scored: {REASON}; first at {source}:6" in shown.err
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
    flags = ["--input", "-", "--dtype", "fp32", "--chunk_size", str(len(RECORDS))]
    command = [sys.executable, "-m", "reward.score", "--model", str(models[0]), *flags]
    text = "".join(json.dumps(record) + "\n" for record in RECORDS)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    buffered = clean_environment() | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, cwd=REPOSITORY, env=buffered, **pipes) as process:
        process.stdin.write(text)
        process.stdin.flush()
        ready = select.poll()  # unlike select.select, for file descriptors above 1023, too
        ready.register(process.stdout, select.POLLIN)
        assert ready.poll(100_000)
        scores = [json.loads(process.stdout.readline())["score"] for _ in RECORDS]
        process.stdout.close()
        _, error = process.communicate(text * 2, timeout=150)
    assert scores[:5] == pytest.approx([row[0] for row in expected], abs=1e-5) and scores[5] is None
    assert process.returncode == 0
    assert "Traceback" not in error and "Exception ignored" not in error


ANSWERS = (["Oak.", "Blue.", "Two", "Yes", "No"], ["Oak.", "I do not know.", "It is three", "", "Well, that depends"])
QUESTIONS = ["Name a tree.", "Which colour?", "How many?", "Really?", "Do you know?"]


def answer_files(tmp_path, *columns: list[dict]) -> list[str]:
    """A file per column: the questions, in order, with what the column holds of each."""
    rows = [[{"prompt": q} | cell for q, cell in zip(QUESTIONS, column, strict=False)] for column in columns]
    return [write_lines(tmp_path / f"{k}.jsonl", records) for k, records in enumerate(rows)]


def test_comparison_of_two_files(models, tmp_path, capsys):
    files = answer_files(tmp_path, *([{"response": text} for text in column] for column in ANSWERS))
    out = tmp_path / "new" / "table.json"
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
    assert table["tie"][1:] == pytest.approx((0.2307, 0.8824), abs=1e-4)  # Wilson, 3 of 5
    shown = capsys.readouterr().out
    assert re.search(r"5 prompts.*\n.*\ntie +3 +60.0 %   \[23.1, 88.2\]\n", shown)


def test_comparison_by_scores_that_are_there(tmp_path, capsys):
    columns = [[{"response": "x", "score": x} for x in scores] for scores in ([3, 2, 1, 9], [1, 2, 3.5, 8])]
    main(["--compare", *answer_files(tmp_path, *columns)])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:4]] == ["2", "1", "1"]
