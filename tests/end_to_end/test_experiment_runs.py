"""Experiments from settings to verdicts, in a tiny world: run, kept, stopped, gone on with, reported."""

import shutil
import threading
import time

import pytest

from experiments import curves, report, run, settings
from experiments.criteria import Claim, Criterion, Figure, end, of
from tests.helpers.tiny_run import read_lines
from utils.errors import UserError

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


@pytest.fixture(scope="module")
def world(inputs, tmp_path_factory):
    """Tiny models where the world's are."""
    folder = tmp_path_factory.mktemp("world")
    for source, name in ((inputs.policy, "sft/final"), (inputs.reward, "reward/final"), (inputs.prompts, "prompts")):
        shutil.copytree(source, folder / name)
    (folder / "dialogues").mkdir()
    for name in ("train", "valid"):
        shutil.copy(inputs.dialogues, folder / "dialogues" / f"{name}.json")
    return folder


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Two settings of 20 steps, one figure, and results of their own."""
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "plain.toml").write_text('preset = "vanilla"\n')
    (tmp_path / "calm.toml").write_text('based_on = "plain"\nlr = 1e-5\n')
    (tmp_path / "introduction.md").write_text("Words, `code`.")
    claim = Claim("KL stays small", [Criterion("KL", of("plain", end("kl_ref")), below=5.0)])
    figures = {"1": Figure("A figure", {"plain": 1, "calm": 1}, [claim]), "2": Figure("Another", {"missing": 1}, [])}
    for module in (curves, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    for module in (run, report):
        monkeypatch.setattr(module, "FIGURES", figures)
    for module in (settings, report):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "SHOW_EVERY", 0.2)
    return run.jobs_of(["1"], tmp_path)


def test_from_settings_to_verdicts(jobs, world, tmp_path, capsys):
    """One run is stopped by SIGTERM, as Ctrl-C sends it to the children, and goes on."""
    calm = jobs[1]

    def stop() -> None:
        while calm.steps < 3:
            time.sleep(0.02)
        calm.process.terminate()

    stopper = threading.Thread(target=stop)
    stopper.start()
    run.work(calm, world, 0.0)
    stopper.join()
    assert 3 <= calm.steps < 21 and not calm.finished and not curves.load_runs("calm")

    run.run_all(jobs, world, workers=1)
    assert "2/2 runs, 42/42 steps" in capsys.readouterr().out
    assert [row["step"] for row in read_lines(calm.folder / "metrics.jsonl")] == list(range(1, 22))
    (kept,) = curves.load_runs("plain")
    logged = read_lines(jobs[0].folder / "metrics.jsonl")
    assert kept.end("kl_ref") == pytest.approx(sum(row["kl_ref"] for row in logged[11:]) / 10, rel=1e-3)
    run.run_all(jobs, world, workers=1)  # finished runs are not made again
    assert capsys.readouterr().out.count("the same numbers as before") == 2
    report.main(["1"])
    assert "| KL stays small |" in (tmp_path / "RESULTS.md").read_text()
    assert (tmp_path / "results" / "figure_1.png").stat().st_size > 10_000
    assert "<code>code</code>" in (tmp_path / "report.html").read_text()


def test_a_run_that_fails_is_named(jobs, world, tmp_path):
    (tmp_path / "plain.toml").write_text("batch_size = 3\n")
    with pytest.raises(UserError, match="ended with code 2, see output"):
        run.work(run.jobs_of(["1"], tmp_path)[0], world, 0.0)
