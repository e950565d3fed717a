"""`python -m reward.strength` and `reward.evaluate` on tiny models: numbers of another tool, and files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, pstdev

import pytest
import torch
from PIL import Image
from transformers import AutoModelForSequenceClassification

from data.formats.dialogue_forms import parse_turns
from data.template import encode_dialogue
from reward import evaluate, strength
from reward.evaluation.annotate import summary
from reward.model import load_scalar_model, save_scalar_model
from reward.train import main as train
from tests.helpers.tiny import SAMPLES, tiny_llama_folder
from tests.helpers.tiny_run import REPOSITORY, SIZES, as_argv, clean_environment, read_lines
from utils.tokenizer import load_tokenizer

DATA, SIDES = SAMPLES / "en" / "preferences", ("chosen", "rejected")


SMALL = {"train_steps": 1, "warmup_steps": 1, "batch_size": 4, "context_truncate": 256, "dtype": "fp32"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Three untrained reward models with their tokenizer, heads large enough for scores to differ."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_llama_folder(folder / "base", **SIZES)
    tokenizer, made = load_tokenizer(str(base), "moss_en"), []
    for seed in range(3):
        model = load_scalar_model(str(base), torch.float32, torch.device("cpu"), seed=seed, say=str)
        model.head.weight.data *= 5
        made.append(folder / f"reward{seed}")
        save_scalar_model(model, str(made[-1]), tokenizer=tokenizer, center=float(seed))
    return made


def scores_elsewhere(folder: Path, dialogues: list[list[str]]) -> list[float]:
    """What transformers' own classifier says of dialogues, less the centre."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = load_tokenizer(str(folder), "moss_en")
    scores = []
    for texts in dialogues:
        ids = torch.tensor([encode_dialogue(tokenizer, parse_turns(texts), "moss_en")[0]])
        scores.append(model(ids).logits.item() - getattr(model.config, "score_center", 0.0))
    return scores


def argv(models: list[Path], **flags) -> list[str]:
    return as_argv({"model": models, "data_path": DATA, "dtype": "fp32"} | flags)


def is_drawn(file: Path) -> bool:
    """A picture that is not of one colour."""
    return len(Image.open(file).convert("L").getcolors()) > 10


@pytest.fixture(scope="module")
def annotated(models, tmp_path_factory) -> Path:
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("strength") / "out"
    rows = read_lines(DATA / "train.jsonl")
    for row in rows[::2]:  # strengths of both signs
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    rows[0]["chosen_score_list"] = [1.0, 2.0]  # an earlier ensemble's
    odd = [{"chosen": ["a"]}, {"prompt": "Hi", "responses": ["one", "two"]}]
    (data / "train.json").write_text(json.dumps([*rows, *odd]))  # all on one line: no two places differ
    shutil.copy(DATA / "valid.jsonl", data / "valid.jsonl")
    strength.main(argv(models, data_path=data, output=out))
    return out


def test_strength_is_the_mean_and_deviation_of_another_tools_scores(models, annotated):
    rows = read_lines(annotated / "train.jsonl")
    assert len(rows) == 16
    assert rows[14:] == [{"chosen": ["a"]}, {"prompt": "Hi", "responses": ["one", "two"]}]
    by_model = [[scores_elsewhere(m, [row[side] for row in rows[:14]]) for m in models] for side in SIDES]
    chosen, rejected = (list(zip(*scores, strict=True)) for scores in by_model)
    for row, better, worse in zip(rows, chosen, rejected, strict=False):
        differences = [a - b for a, b in zip(better, worse, strict=True)]
        assert row["mean preference difference"] == pytest.approx(fmean(differences), abs=1e-5)
        assert row["std preference difference"] == pytest.approx(pstdev(differences), abs=1e-5)
        assert row["chosen score list"] == pytest.approx(better, abs=1e-5)
        assert row["rejected score list"] == pytest.approx(worse, abs=1e-5)
    assert "chosen_score_list" not in rows[0]
    assert is_drawn(annotated / "strength.png")
    assert sorted(file.name for file in annotated.iterdir()) == ["strength.png", "train.jsonl", "valid.jsonl"]


def test_strength_of_what_fits_every_model(models, tmp_path, capsys):
    """The second model's window is too short for the first pair: that stays as it is, the others keep their numbers."""
    small, out, data = tmp_path / "small", tmp_path / "out", tmp_path / "x.jsonl"
    shutil.copytree(models[1], small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    rows = [{"chosen": [q, "Yes."], "rejected": [q, "No, never."]} for q in ("Why? " * 40, "Really?", "Is it?")]
    data.write_text("\n".join(map(json.dumps, rows)))
    strength.main(argv([models[0], small], data_path=data, output=out))
    written = read_lines(out / "x.jsonl")
    assert written[0] == rows[0]
    for side in SIDES:
        scores = [scores_elsewhere(model, [row[side] for row in rows[1:]]) for model in models[:2]]
        for row, expected in zip(written[1:], zip(*scores, strict=True), strict=True):
            assert row[f"{side} score list"] == pytest.approx(expected, abs=1e-5)
    assert "mean preference difference of 2 pairs" in capsys.readouterr().out


def test_the_histogram_in_text():
    """-0.3 to 3.3 in twelve rows of 0.3: two means in the first, one in the fourth, fifth and last."""
    first, _, *rows = summary([-0.3, -0.1, 0.7, 1.0, 3.3], [0.0, 1.0, 2.0, 3.0, 4.0]).splitlines()
    assert "of 5 pairs: mean 0.920" in first and first.endswith("below 0: 2 (40.0%)")
    assert [row.split()[3] for row in rows] == [*"2001100", *"00001"]
    assert rows[0].split()[4] == "#" * 40 and rows[3].split()[4] == "#" * 20


def test_training_reads_what_strength_wrote(models, annotated, tmp_path, capsys):
    paths = {"hf_model_name_or_path": models[0], "data_path": annotated, "model_save_path": tmp_path / "out"}
    train(as_argv(paths | SMALL | {"use_margin": True, "flip_negative": True}))
    negative = sum(row["mean preference difference"] < 0 for row in read_lines(annotated / "train.jsonl")[:14])
    assert 0 < negative < 14
    said = capsys.readouterr().out
    assert f"preferences: {negative} of 14 flipped" in said
    assert "preferences: 1 without a margin" in said


def test_an_evaluation_says_what_another_tools_scores_say(models, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(DATA / "train.jsonl", data / "train.jsonl")
    valid = read_lines(DATA / "train.jsonl")
    for name, part in (("helpful", valid[:8]), ("harmless", valid[8:])):
        (data / f"{name}_valid.jsonl").write_text("\n".join(map(json.dumps, part)))
    evaluate.main(argv(models[:2], data_path=data, output=tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    ordered = valid[8:] + valid[:8]
    for model in models[:2]:
        found = report["models"][str(model)]
        chosen, rejected = (scores_elsewhere(model, [row[side] for row in ordered]) for side in SIDES)
        hits = [a > b for a, b in zip(chosen, rejected, strict=True)]
        assert found["accuracy"] == pytest.approx(fmean(hits))
        assert found["subsets"]["harmless"]["accuracy"] == pytest.approx(fmean(hits[:6]))
        assert found["subsets"]["helpful"]["accuracy"] == pytest.approx(fmean(hits[6:]))
        assert found["score_difference"] == pytest.approx(fmean(chosen) - fmean(rejected), abs=1e-5)
    for name in ("differences", "calibration", "lengths"):
        assert is_drawn(tmp_path / "out" / f"{name}.png")
    table = capsys.readouterr().out
    assert "14 prompts, 14 pairs from" in table and "all 2 models" in table
    evaluate.main(argv(models[:1], data_path=data, subsets=["helpful"]))
    assert "8 prompts, 8 pairs" in capsys.readouterr().out


def test_the_recipe_trains_and_evaluates_from_anywhere(models, tmp_path):
    out = tmp_path / "out"
    paths = {"MODEL": str(models[0].parent / "base"), "DATA": str(DATA), "OUTPUT": str(out), "NUM_GPUS": "0"}
    # What the recipe finds as `python` is what runs these tests, in whatever environment.
    environment = clean_environment() | paths | {"VIRTUAL_ENV": sys.prefix, "TQDM_DISABLE": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(
        ["bash", str(REPOSITORY / "reward" / "run.sh"), *as_argv(SMALL)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    config = json.loads((out / "config.json").read_text())
    assert (config["train_steps"], config["reward_lm_loss_factor"], config["lr"]) == (1, 1.0, 5e-6)
    assert list(json.loads((out / "evaluation" / "evaluation.json").read_text())["models"]) == [str(out / "best")]
