"""Experiments from settings to verdicts, in a tiny world: run, kept, stopped, gone on with, reported."""

import json
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


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Two settings of 20 steps, one figure, and results of their own."""
    for name, text in {
        "base": BASE,
        "plain": 'preset = "vanilla"\n',
        "calm": 'based_on = "plain"\nlr = 1e-5\n',
    }.items():
        (tmp_path / f"{name}.toml").write_text(text)
    claim = Claim("KL stays small", [Criterion("KL", of("plain", end("kl_ref")), below=5.0)])
    figures = {"1": Figure("A figure", {"plain": 2, "calm": 1}, [claim]), "2": Figure("Another", {"missing": 1}, [])}
    monkeypatch.setattr(settings, "FOLDER", tmp_path)
    (tmp_path / "introduction.md").write_text("Words, `code`.")
    for module, name, value in (
        (curves, "RESULTS", tmp_path / "results"), (report, "RESULTS", tmp_path / "results"),
        (report, "FOLDER", tmp_path), (run, "FIGURES", figures), (report, "FIGURES", figures),
        (run, "SHOW_EVERY", 0.2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


def test_from_settings_to_verdicts(world, tmp_path, capsys):
    jobs = run.jobs_of(["1"], tmp_path)
    found = [(job.setting, job.seed, job.total_steps) for job in jobs]
    assert found == [("plain", 1, 21), ("plain", 2, 21), ("calm", 1, 21)]
    run.run_all(jobs, world, workers=2)
    shown = capsys.readouterr().out
    assert shown.count(": new") == 3 and "3/3 runs, 63/63 steps" in shown
    plain, calm = curves.load_runs("plain"), curves.load_runs("calm")
    assert [kept.seed for kept in plain] == [1, 2] and plain[0].steps == 20
    logged = read_lines(jobs[0].folder / "metrics.jsonl")
    assert plain[0].end("kl_ref") == pytest.approx(sum(row["kl_ref"] for row in logged[11:]) / 10, rel=1e-3)
    assert plain[0].curves != calm[0].curves and abs(calm[0].tax) < abs(plain[0].tax)

    run.run_all(jobs, world, workers=1)  # finished runs are not made again
    assert capsys.readouterr().out.count("same results as before") == 3
    report.main(["1"])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| KL stays small |  |  | confirmed |" in text and "experiments.run --figure 2`." in text
    assert (tmp_path / "results" / "figure_1.png").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    assert 'class="confirmed"' in page and "<code>code</code>" in page and "http" not in page


def test_a_stopped_run_goes_on(world, tmp_path):
    """SIGTERM from another thread, as Ctrl-C sends it to the children."""
    (job,) = [job for job in run.jobs_of(["1"], tmp_path) if job.setting == "calm"]

    def stop() -> None:
        while job.steps < 3:
            time.sleep(0.02)
        job.process.terminate()

    stopper = threading.Thread(target=stop)
    stopper.start()
    run.work(job, world, 0.0)
    stopper.join()
    assert 3 <= job.steps < 21 and not job.finished and not curves.load_runs("calm")
    run.work(job, world, 0.0)
    assert job.finished and [row["step"] for row in read_lines(job.folder / "metrics.jsonl")] == list(range(1, 22))
    assert json.loads((job.folder / "config.json").read_text())["resumed_from_step"] >= 3


def test_a_run_that_fails_is_named(world, tmp_path):
    (tmp_path / "plain.toml").write_text("batch_size = 3\n")
    job = run.jobs_of(["1"], tmp_path)[0]
    with pytest.raises(UserError, match="exit code 2; see output"):
        run.work(job, world, 0.0)
    assert "--batch_size 3" in (job.folder / "output.log").read_text()
