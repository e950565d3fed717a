"""`python -m reward.train` on tiny models: losses, evaluations, options of Part II, and saved folders."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data.formats.dialogue_forms import parse_turns
from data.preferences import load_preferences
from data.template import encode_dialogue
from reward.config import RewardConfig
from reward.stage import load
from reward.train import main
from tests.helpers.tiny import SAMPLES, tiny_llama_folder
from tests.helpers.tiny_run import fit_flags, read_lines
from utils.flags.data import RecordFlags
from utils.tokenizer import load_tokenizer

DATA = SAMPLES / "en" / "preferences"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("base"))


def flags(base: Path, out: Path, **changes) -> list[str]:
    return fit_flags(
        base, DATA, out, **{"context_truncate": 256, "train_steps": 6, "warmup_steps": 2, "save_per_step": 3} | changes
    )


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "reward"
    main(flags(base, out, train_steps=16, save_per_step=8, validation_metric="loss"))
    return out


def test_the_loss_falls_and_held_out_pairs_are_ranked(run):
    metrics = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 17))
    assert metrics[-1]["loss"] < 0.3
    assert metrics[-1]["eval_accuracy"] == 1.0
    assert metrics[-1]["eval_score_difference"] > metrics[7]["eval_score_difference"] > 0
    always = "step loss accuracy score_difference lr grad_norm tokens_per_second memory_peak_gb"
    expected = set(always.split())
    assert set(metrics[0]) == expected
    held_out = "loss accuracy score_difference calibration_error length_correlation length_bias worst_subset_accuracy"
    assert set(metrics[7]) == expected | {f"eval_{name}" for name in held_out.split()}


def test_transformers_loads_the_result(run):
    for folder in ("best", "final"):
        model, report = AutoModelForSequenceClassification.from_pretrained(run / folder, output_loading_info=True)
        assert not report["missing_keys"] and model.config.num_labels == 1
        tokenizer, text = AutoTokenizer.from_pretrained(run / folder), "How do I boil an egg?  Tell me 😀"
        ours = load_tokenizer(str(run / folder)).encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False) == ours
    assert list((run / "tensorboard").glob("events.*"))


def test_micro_batches_change_nothing_and_the_lm_term_adds_up(base, tmp_path):
    """Micro-batches change nothing; step 1, before any update, costs beta x CE more with the LM term."""
    for name, changes in {"a": {}, "b": {"micro_batch_tokens": 1}, "c": {"reward_lm_loss_factor": 0.5}}.items():
        main(flags(base, tmp_path / name, train_steps=2, **changes))
    a, b, c = (read_lines(tmp_path / name / "metrics.jsonl") for name in "abc")
    for row_a, row_b in zip(a, b, strict=True):
        for key in ("loss", "accuracy", "score_difference", "grad_norm"):
            assert row_b[key] == pytest.approx(row_a[key], rel=1e-4, abs=1e-6)
    assert c[0]["ranking_loss"] == pytest.approx(a[0]["loss"], rel=1e-5)
    assert c[0]["loss"] == pytest.approx(c[0]["ranking_loss"] + 0.5 * c[0]["lm_loss"], rel=1e-5)
    assert abs(c[0]["lm_loss"] - 6.0) < 0.5  # a random model spreads over 400 pieces: ln 400 = 5.99
    assert c[1]["eval_lm_loss"] < c[0]["lm_loss"]


def test_everything_of_part_two_at_once(base, tmp_path, capsys):
    """Margins, smoothing, flips, a contrastive term, centring; ranked answers beside pairs, held out in two subsets."""
    data = tmp_path / "data"
    data.mkdir()
    rows = read_lines(DATA / "train.jsonl")
    ranked = {"prompt": "Name a tree.", "responses": ["An oak.", "Tree", "No."], "scores": [3, 1, 0]}
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, [*rows, ranked])))
    (data / "helpful_valid.jsonl").write_text((DATA / "valid.jsonl").read_text())
    (data / "other_valid.jsonl").write_text(json.dumps(ranked))
    (tmp_path / "sft.json").write_text(json.dumps([["Name a tree.", "An oak."], ["Why?", "Because."]]))
    out = tmp_path / "out"
    changes = {
        "data_path": data, "train_steps": 3, "save_per_step": 3, "use_margin": True, "label_smoothing": 0.1,
        "flip_negative": True, "simcse_coef": 0.5, "center_scores": True, "center_data_path": tmp_path / "sft.json",
        "validation_metric": "calibration_error",
    }  # fmt: skip
    main(flags(base, out, **changes))
    said = capsys.readouterr().out
    assert "preferences: 1 of 14 flipped" in said
    assert "best eval_calibration_error so far" in said
    metrics = read_lines(out / "metrics.jsonl")
    for row in metrics:
        assert row["loss"] == pytest.approx(row["ranking_loss"] + 0.5 * row["simcse_loss"], rel=1e-5)
        assert row["simcse_loss"] > 0
    assert {"eval_accuracy_helpful", "eval_accuracy_other", "eval_score_center"} <= set(metrics[-1])
    assert metrics[-1]["eval_loss"] != pytest.approx(metrics[-1]["loss"], rel=1e-3)  # no margin, no smoothing
    other = AutoModelForSequenceClassification.from_pretrained(out / "final")
    assert other.config.score_center == pytest.approx(metrics[-1]["eval_score_center"])
    assert other.config.attention_dropout == 0.0
    mean = mean_score_elsewhere(out / "final", [["Name a tree.", "An oak."], ["Why?", "Because."]])
    assert mean == pytest.approx(other.config.score_center, abs=1e-5)


def mean_score_elsewhere(folder: Path, dialogues: list[list[str]]) -> float:
    """Of transformers' own classifier, which knows no score_center."""
    tokenizer, model = load_tokenizer(str(folder)), AutoModelForSequenceClassification.from_pretrained(folder)
    scores = []
    for texts in dialogues:
        ids, _ = encode_dialogue(tokenizer, parse_turns(texts), "moss_en")
        scores.append(model(torch.tensor([ids])).logits.item())
    return sum(scores) / len(scores)


def test_dropout_is_there_for_the_contrastive_term_alone(base):
    paths = {"hf_model_name_or_path": str(base), "data_path": "D", "model_save_path": "O", "context_truncate": 256}
    for coef, share in ((0.0, 0.0), (0.5, 0.2)):
        config = RewardConfig(**paths, dtype="bf16", simcse_coef=coef, simcse_dropout=0.2)
        modules = load(config, load_tokenizer(str(base)), str).modules()
        assert {m.attention_dropout for m in modules if hasattr(m, "attention_dropout")} == {share}


def test_centring_on_the_held_out_answers_leaves_their_mean_at_zero(base, tmp_path):
    main(flags(base, tmp_path / "a", train_steps=2, center_scores=True))
    main(flags(tmp_path / "a" / "final", tmp_path / "b", train_steps=2, center_scores=True, lr=1e-12))
    first, second = (read_lines(tmp_path / name / "metrics.jsonl")[-1]["eval_score_center"] for name in "ab")
    assert abs(first) > 1e-2
    chosen = [[p.history[0]["content"], p.answers[0]] for p in load_preferences([str(DATA)], RecordFlags(), str)[1]]
    assert mean_score_elsewhere(tmp_path / "a" / "final", chosen) == pytest.approx(first, abs=1e-5)
    assert second == pytest.approx(0.0, abs=1e-5)


def test_bf16_and_every_zero_stage_agree(base, tmp_path):
    losses = {}
    for dtype, stage in (("fp32", 0), ("fp32", 3), ("bf16", 3)):
        out = tmp_path / f"{dtype}{stage}"
        main(flags(base, out, dtype=dtype, zero_stage=stage, train_steps=2))
        losses[dtype, stage] = [row["loss"] for row in read_lines(out / "metrics.jsonl")]
    reference = losses["fp32", 0]
    assert losses["fp32", 3] == pytest.approx(reference, rel=1e-5)
    assert losses["bf16", 3] == pytest.approx(reference, rel=2e-2)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(base, tmp_path, capsys):
    broken = shutil.copytree(base, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][:] = 1e38  # finite, but the logits that come of both are not
    state["lm_head.weight"].mul_(1e6)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as stopped:
        main(flags(broken, tmp_path / "out", reward_lm_loss_factor=1))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    batch = tmp_path / "out" / "bad_batches" / "step_1.json"
    assert re.search(rf"the loss is (nan|inf) \(rank 0\); no step was made.* \[step 1, batch in {batch}\]", error)
    assert [set(row) >= {"answers", "source"} for row in json.loads(batch.read_text())] == [True] * 4
    assert not (tmp_path / "out" / "final").exists()
