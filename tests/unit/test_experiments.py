"""Experiments: gold scores by hand, verdicts from made-up numbers, and a tiny one from its settings to its report."""

import json
import shutil

import pytest

from experiments import curves, report, run, settings
from experiments.claims import FIGURES
from experiments.criteria import (
    Claim,
    Criterion,
    Figure,
    at_equal_seconds,
    collapses,
    end,
    frontier,
    frontier_difference,
    gold_at,
    of,
    stable,
)
from experiments.curves import Run, load_runs, read_run
from experiments.gold import gold
from experiments.report import alarm_of, fall_of
from experiments.settings import FOLDER, command, load_flags
from ppo.config import AMOUNTS, PRESETS, PPOConfig
from tests.helpers.tiny_run import read_lines
from utils.flags.parser import parse_args

BASE = """
dtype = "fp32"
zero_stage = 0
train_steps = 20
critic_pretrain_steps = 1
lr = 1e-4
critic_lr = 1e-3
warmup_steps = 1
num_rollouts = 4
batch_size = 4
maxlen_prompt = 60
maxlen_res = 8
num_samples = 4
num_eval_prompts = 0
checkpoint_per_step = 5
"""


def run_of(setting="a", seed=1, **values) -> Run:
    """Curves of 20 bins, constant unless a list is given."""
    numbers = {"kl_ref": 1.0, "gold": 0.0} | values
    made = {name: value if isinstance(value, list) else [value] * 20 for name, value in numbers.items()}
    return Run(setting, seed, "h", "c", 1.0, 0.0, made, "AVX512")


def test_gold_takes_repetition_and_length_off_the_sentiment():
    # VADER: 1.9 for good; 1.9 / sqrt(1.9 ** 2 + 15). Repetition counts long words alone.
    assert gold(["good day", ""]) == [pytest.approx(0.4404, abs=1e-4), -1.0]
    assert gold(["good good"]) == [pytest.approx(3.8 / (3.8**2 + 15) ** 0.5 - 0.5, abs=1e-4)]
    assert gold(["a good day to us all is it"])[0] - gold(["a good day to us all is it for me now"])[0] > 0.3


def test_every_setting_is_a_command_line():
    """Those of the figures and no others; each starts from the base."""
    wanted = {setting for figure in FIGURES.values() for setting in figure.settings}
    named = {part for name in wanted for part in name.split("@") if "=" not in part}
    assert {file.stem for file in FOLDER.glob("*.toml")} == named | {"base", "estimators"}
    for name in wanted:
        config = parse_args(PPOConfig, command(name, 3, FOLDER, FOLDER / "out"), PRESETS, AMOUNTS)
        assert config.seed == 3 and config.maxlen_res == (64 if name.startswith("long") else 16)
        assert len(load_flags(name).items() - load_flags("base").items()) <= (16 if name.startswith("long") else 8), (
            name
        )


def test_verdicts():
    """Means 2 with an interval of ±2.48 (t = 4.303, deviation 1), and a tenth of that."""
    wide = {"a": [run_of(seed=s, kl_ref=value) for s, value in enumerate((1.0, 2.0, 3.0))]}
    narrow = {"a": [run_of(seed=s, kl_ref=value) for s, value in enumerate((1.9, 2.0, 2.1))]}
    measure = of("a", lambda run: run.end("kl_ref"))
    assert Criterion("", measure, above=1.0).evaluate(wide) == ("undecided", 2.0, pytest.approx(2.484, abs=1e-3))
    for bounds, verdict in (({"above": 1.0}, "confirmed"), ({"above": 2.5}, "refuted"), ({"below": 1.0}, "refuted")):
        assert Criterion("", measure, **bounds).evaluate(narrow)[0] == verdict
    sound, unsure, wrong = (Criterion("", measure, above=bound) for bound in (1.0, 2.0, 2.5))
    assert Claim("", [sound, unsure]).evaluate(narrow) == "undecided"
    assert Claim("", [unsure, wrong, sound]).evaluate(narrow) == "refuted"


def test_frontiers_and_equal_seconds():
    """Gold on straight lines through (0, start); the slower run is compared at half its steps."""
    runs = {
        "a1": [run_of("a1", kl_ref=1.0, gold=[0.0] * 10 + [0.4] * 10)],
        "a2": [run_of("a2", kl_ref=3.0, gold=[0.0] * 10 + [0.8] * 10)],
        "b1": [run_of("b1", kl_ref=4.0, gold=[0.0] * 10 + [0.4] * 10)],
    }
    points = frontier([runs["a1"][0], runs["a2"][0]], 0.0)
    assert points == [(0.0, 0.0), (1.0, 0.4), (3.0, 0.8)]
    assert [gold_at(points, kl) for kl in (0.5, 2.0, 9.0)] == [pytest.approx(x) for x in (0.2, 0.6, 0.8)]
    assert frontier_difference(["a1", "a2"], ["b1"], 2.0)(runs) == [pytest.approx(0.6 - 0.2)]
    slow, fast = (run_of(name, gold=[float(i) for i in range(20)]) for name in ("slow", "fast"))
    measured = at_equal_seconds("slow", "fast", "gold", 1.6, 25)({"fast": [fast], "slow": [slow]})
    assert measured == [9.0 - 18.5]  # 200 / 1.6 - 25 = 100 steps: the last tenth of 10 bins, and of 20


def test_collapse_fall_and_alarm():
    sunk = {"a": [run_of(seed=s, kl_ref=90.0 + s, gold=[0.2] * 10 + [-0.5 + s / 100] * 10) for s in range(3)]}
    calm = {"a": [run_of(seed=s, kl_ref=5.0 + s / 10, gold=[0.2] * 10 + [0.3 + s / 100] * 10) for s in range(3)]}
    assert Claim("", collapses("a")).evaluate(sunk) == Claim("", stable("a")).evaluate(calm) == "confirmed"
    assert Claim("", collapses("a")).evaluate(calm) == Claim("", stable("a")).evaluate(sunk) == "refuted"
    assert fall_of(run_of(gold=[0.0, 0.5] * 10)) is None
    fallen = run_of(gold=[0.3] * 10 + [0.1] * 10, kl_ref=[1.0] * 12 + [6.0] * 8)
    assert fall_of(fallen) == (130, 2.0)  # three of five bins: 0.12 below; of the last of them KL 6
    others = dict.fromkeys(("perplexity", "eos_fraction", "response_length", "score_std"), 2.0)
    assert alarm_of(run_of(kl_ref=[15.9] * 20, **others)) is None
    assert alarm_of(run_of(kl_ref=[15.9] * 12 + [16.1] * 8, **others)) == 130  # a nat per token


def test_a_finished_run_is_read_in_bins(tmp_path):
    """Critic pre-training is left out; gold comes from the step's samples."""
    (tmp_path / "config.json").write_text(json.dumps({"critic_pretrain_steps": 2, "git_commit": "abcdefghij"}))
    numbers = dict.fromkeys([*curves.METRICS, "seconds_rollout", "seconds_score", "seconds_update"], 2.0)
    rows = [numbers | {"step": s, "kl_ref": 10.0 * s, "perplexity": 4.0} for s in range(1, 23)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = [{"step": s, "answer": answer} for s in range(1, 23) for answer in ("", "good day")]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    found = read_run(tmp_path, "x", 3, "hash", 0.123456789)
    assert found.curves["kl_ref"] == [75.0, 175.0]  # steps 3 to 12 and 13 to 22
    assert found.curves["paper_perplexity"] == [2.0, 2.0]  # exp(ln 4 / 2)
    assert found.curves["gold"] == pytest.approx([(0.4404 - 1) / 2] * 2, abs=1e-4)
    assert (found.seconds, found.tax, found.commit) == (132, 0.12346, "abcdefg")


@pytest.mark.slow
def test_from_settings_to_verdicts(inputs, tmp_path, monkeypatch, capsys):
    """Tiny models where the world's are; two settings of 20 steps, one figure, and results of their own."""
    world = tmp_path / "world"
    for source, name in ((inputs.policy, "sft/final"), (inputs.reward, "reward/final"), (inputs.prompts, "prompts")):
        shutil.copytree(source, world / name)
    (world / "dialogues").mkdir()
    for name in ("train", "valid"):
        shutil.copy(inputs.dialogues, world / "dialogues" / f"{name}.json")
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "plain.toml").write_text('preset = "vanilla"\n')
    (tmp_path / "calm.toml").write_text('based_on = "plain"\nlr = 1e-5\n')
    (tmp_path / "introduction.md").write_text("Words, `code`.")
    claim = Claim("KL stays small", [Criterion("KL", of("plain", end("kl_ref")), below=5.0)])
    figures = {"1": Figure("A figure", {"plain": 1, "calm": 1}, [claim])}
    changes = {"RESULTS": tmp_path / "results", "FIGURES": figures, "FOLDER": tmp_path}
    for module, names in ((curves, ["RESULTS"]), (run, ["FIGURES"]), (settings, ["FOLDER"]), (report, list(changes))):
        for name in names:
            monkeypatch.setattr(module, name, changes[name])

    jobs = run.jobs_of(["1"], tmp_path)
    run.run_all(jobs, world, workers=1)
    assert "2/2 runs, 42/42 steps" in capsys.readouterr().out
    (kept,), (calm,) = load_runs("plain"), load_runs("calm")
    logged = read_lines(jobs[0].folder / "metrics.jsonl")
    assert kept.end("kl_ref") == pytest.approx(sum(row["kl_ref"] for row in logged[11:]) / 10, rel=1e-3)
    assert abs(calm.tax) < abs(kept.tax)
    run.run_all(jobs, world, workers=1)  # finished runs are not made again
    assert capsys.readouterr().out.count("same results as before") == 2
    report.main(["1"])
    assert "| KL stays small |" in (tmp_path / "RESULTS.md").read_text()
    assert (tmp_path / "results" / "figure_1.png").stat().st_size > 10_000
    assert "<code>code</code>" in (tmp_path / "report.html").read_text()
