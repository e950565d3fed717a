"""Sections of RewardBench and bins of preference strength, against numbers worked out by hand; files of its form."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

from reward import evaluate
from reward.batches import Comparison
from reward.evaluation.groups import SECTIONS, by_strength, section_accuracies
from reward.metrics import ScoredItems
from tests.helpers.tiny_run import as_argv, tiny_reward_model


def test_sections_are_weighted_as_the_benchmark_does():
    """math-prm weighs as much as the six languages together: (0.5 + 1) / 2. Chat: 100 right of 100 + 28 pairs."""
    code = {f"hep-{name}": 1.0 for name in ("cpp", "go", "java", "js", "python", "rust")}
    found = section_accuracies({"math-prm": 0.5, "alpacaeval-easy": 1.0, "mt-bench-easy": 0.0} | code)
    assert found == pytest.approx({"Chat": 100 / 128, "Reasoning": 0.75})
    assert section_accuracies({"math-prm": 0.5, "mine": 1.0}) == section_accuracies({}) == {}


def test_weights_are_the_benchmarks_numbers_of_pairs():
    """Its table: 358, 456, 740 and 1,431 pairs, 2,985 in all, of which 447 are math-prm's."""
    totals = {section: sum(weights.values()) for section, weights in SECTIONS.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1431 - 447 + 984}


def test_xstest_has_the_numbers_of_the_benchmarks_code():
    """EXAMPLE_COUNTS gives 250 to should-refuse, of which the data has 154; its leaderboard weighs by them."""
    assert section_accuracies({"xstest-should-refuse": 1.0, "xstest-should-respond": 0.0}) == {"Safety": 250 / 404}


def test_accuracy_by_strength():
    """Eleven pairs, ten of known strength, in fifths of two; those of strength below 0 are scored the other way."""
    items = [Comparison([[1, 2], [1, 3]], 1, [(0, 1)], [0.0], "all", "x:1", place=place) for place in range(11)]
    strengths = {place: (place - 2) * 0.5 for place in range(10)}  # -1, -0.5, 0, ..., 3.5
    scores = torch.tensor([x for place in range(11) for x in ((-1.0, 0.0) if place < 2 else (1.0, 0.0))])
    groups = by_strength(ScoredItems(items, scores), dict(reversed(strengths.items())))
    assert [(g["low"], g["high"]) for g in groups] == [(-1, -0.5), (0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5)]
    assert [g["accuracy"] for g in groups] == [0, 1, 1, 1, 1] and {g["prompts"] for g in groups} == {2}
    assert by_strength(ScoredItems(items, scores), {}) == []


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_of_its_form(kind, tmp_path, capsys):
    """Texts and lists of messages; the table's sections follow from its subsets."""
    model = tiny_reward_model(tmp_path / "reward", 400)
    rows = [
        {"prompt": f"Question {i}?", "chosen": "Yes, I do.", "rejected": f"No {i}", "chosen_model": "a",
         "rejected_model": "b", "subset": subset, "id": i}
        for i, subset in enumerate(["alpacaeval-easy", "mt-bench-easy", "math-prm", "hep-go", "hep-go", "donotanswer"])
    ]  # fmt: skip
    if kind == "parquet":
        file = tmp_path / "filtered.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        for side in ("chosen", "rejected"):
            rows[0][side] = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": rows[0][side]}]
        file = tmp_path / "filtered.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(as_argv({"model": model, "data_path": file, "dtype": "fp32", "output": tmp_path / "out"}))
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))["models"][str(model)]
    found = {name: part["accuracy"] for name, part in report["subsets"].items()}
    assert len(found) == 5 and report["rewardbench"] == pytest.approx({
        "Chat": (100 * found["alpacaeval-easy"] + 28 * found["mt-bench-easy"]) / 128,
        "Safety": found["donotanswer"], "Reasoning": (984 * found["math-prm"] + 164 * found["hep-go"]) / 1148,
    })  # fmt: skip
    assert "mean of sections" in capsys.readouterr().out and report["strength"] == []


def test_annotated_records(tmp_path, capsys):
    """The column of reward.strength; a record without it is in no fifth."""
    rows = [{"prompt": f"{i}?", "chosen": "Yes.", "rejected": f"No {i}"} for i in range(6)]
    for i, row in enumerate(rows[1:]):
        row["mean preference difference"] = 4.0 - i
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_reward_model(tmp_path / "reward", 400)
    evaluate.main(as_argv({"model": model, "data_path": tmp_path / "pairs.jsonl", "dtype": "fp32"}))
    lines = capsys.readouterr().out.partition("by strength of the preference\n")[2].splitlines()[:5]
    assert [line.split()[0] for line in lines] == ["0.00", "1.00", "2.00", "3.00", "4.00"]
    assert all(line.endswith("of 1") for line in lines)
