"""Gold scores by hand, results of a run, verdicts on constructed numbers."""

import json
from dataclasses import replace

import pytest

from experiments import curves
from experiments.claims import FIGURES
from experiments.criteria import Claim, Criterion, of
from experiments.curves import Run, gold_means, load_runs, read_run, save_run
from experiments.gold import excess, gold, repetition
from experiments.mutants import MUTANTS, copy_code
from experiments.settings import FOLDER, REPOSITORY, command, load_flags, run_hash
from ppo.config import AMOUNTS, PRESETS, PPOConfig
from utils.errors import UserError
from utils.flags.parser import parse_args


def run_of(setting="a", seed=1, **values) -> Run:
    """Curves of 20 bins, constant unless a list is given."""
    numbers = {"kl_ref": 1.0, "gold": 0.0} | values
    made = {name: value if isinstance(value, list) else [value] * 20 for name, value in numbers.items()}
    return Run(setting, seed, "h", "c", 1.0, 0.0, made, "AVX512")


def test_gold_is_sentiment_minus_repetition_and_length():
    assert repetition(["the", "good", "the", "good", "good", "day"]) == pytest.approx(2 / 3)  # of long words
    lost = {0: 1, 1: 1, 2: 0, 10: 0, 11: 1 / 3, 12: 2 / 3, 13: 1, 99: 1}
    assert {words: excess(words) for words in lost} == pytest.approx(lost)
    # VADER: 1.9 for good; 1.9 / sqrt(1.9 ** 2 + 15)
    twice = 3.8 / (3.8**2 + 15) ** 0.5
    assert gold(["good day", "good good", ""]) == pytest.approx([0.4404, twice - 0.5, -1.0], abs=1e-4)


def test_every_setting_is_a_command_line():
    """Those of the figures and no others; each starts from the base."""
    wanted = {setting for figure in FIGURES.values() for setting in figure.settings}
    assert {file.stem for file in FOLDER.glob("*.toml")} == wanted | {"base"}
    for name in wanted:
        config = parse_args(PPOConfig, command(name, 3, FOLDER, FOLDER / "out"), PRESETS, AMOUNTS)
        assert config.seed == 3 and config.maxlen_res == 16
        assert len(load_flags(name).items() - load_flags("base").items()) <= 7, name
    assert len({run_hash(*run) for run in (("ppo_max", 1), ("ppo_max", 1), ("ppo_max", 2), ("vanilla", 1))}) == 3
    with pytest.raises(UserError, match="no setting nonsense"):
        load_flags("nonsense")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_the_toolkit_but_for_its_mistake(tmp_path, name):
    copy_code(name, tmp_path / "code")
    file, right, wrong = MUTANTS[name]
    changed = (tmp_path / "code" / file).read_text()
    assert changed != (REPOSITORY / file).read_text() == changed.replace(wrong, right)
    compile(changed, file, "exec")


def test_verdicts():
    """Means 2 with an interval of ±2.48 (t = 4.303, deviation 1), and a tenth of that."""
    wide = {"a": [run_of(seed=s, kl_ref=value) for s, value in enumerate((1.0, 2.0, 3.0))]}
    narrow = {"a": [run_of(seed=s, kl_ref=value) for s, value in enumerate((1.9, 2.0, 2.1))]}
    measure = of("a", lambda run: run.end("kl_ref"))
    assert Criterion("", measure, above=1.0).evaluate(wide) == ("undecided", 2.0, pytest.approx(2.484, abs=1e-3))
    assert Criterion("", measure, above=1.0).evaluate(narrow)[0] == "confirmed"
    assert Criterion("", measure, above=2.5).evaluate(narrow)[0] == "refuted"
    assert Criterion("", measure, below=1.0).evaluate(narrow)[0] == "refuted"
    assert Criterion("", measure, below=3.0).evaluate(narrow)[0] == "confirmed"
    assert Criterion("", measure, below=3.0).evaluate({"a": narrow["a"][:1]})[0] == "undecided"
    sound, unsure, wrong = (Criterion("", measure, above=bound) for bound in (1.0, 2.0, 2.5))
    assert Claim("", [sound, unsure]).evaluate(narrow) == "undecided"
    assert Claim("", [unsure, wrong, sound]).evaluate(narrow) == "refuted"


def test_a_finished_run_is_read_in_bins(tmp_path, monkeypatch):
    """Critic pre-training is left out; gold comes from the step's samples; results survive saving."""
    (tmp_path / "config.json").write_text(json.dumps({"critic_pretrain_steps": 2, "git_commit": "abcdefghij"}))
    numbers = dict.fromkeys(curves.METRICS, 1.0)
    numbers |= dict.fromkeys(["seconds_rollout", "seconds_score", "seconds_update"], 2) | {"perplexity": 4.0}
    rows = [{"step": s, **numbers, "kl_ref": 10.0 * s, "response_length": 2.0} for s in range(1, 23)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = [{"step": s, "answer": answer} for s in range(1, 23) for answer in ("", "good day")]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    run = read_run(tmp_path, "x", 3, "hash", 0.123456789)
    assert run.curves["kl_ref"] == [75.0, 175.0]  # steps 3 to 12 and 13 to 22
    assert run.curves["paper_perplexity"] == [2.0, 2.0]  # exp(ln 4 / 2)
    assert run.curves["gold"] == pytest.approx([(0.4404 - 1) / 2] * 2, abs=1e-4)
    assert (run.seconds, run.tax, run.commit) == (132, 0.12346, "abcdefg")
    assert gold_means(tmp_path / "samples.jsonl")[5] == pytest.approx((0.4404 - 1) / 2, abs=1e-4)
    monkeypatch.setattr(curves, "RESULTS", tmp_path)
    save_run(run)
    save_run(replace(run, seed=1))
    assert load_runs("x") == [replace(run, seed=1), run]
