"""Runs with wandb (offline), mlflow (files) and swanlab (offline), which `source utils/setup.sh trackers` installs."""

import json
import os
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.tiny_run import HELD_OUT, PROMPTS, REPOSITORY, clean_environment, read_lines, run_flags, write_json
from utils.errors import UserError
from utils.flags.run import RunFlags

NAMES = ("wandb", "mlflow", "swanlab")
OFFLINE = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
EVIL = "<script>alert(1)</script> \x1b[2J"
SECRET = "http://127.0.0.1:9/T0pSecret"
STEPS = (1, 2)  # of the run, and after it was resumed

pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.skipif(not find_spec(x), reason=f"no {x}: source utils/setup.sh trackers") for x in NAMES),
]


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """The folder of a run of one step that was resumed for another one."""
    folder = tmp_path_factory.mktemp("trackers")
    (folder / "prompts").mkdir()
    write_json(folder / "prompts" / "train.json", [[EVIL], *PROMPTS[:7]])
    write_json(folder / "prompts" / "valid.json", HELD_OUT)
    flags = {
        "data_path": folder / "prompts", "report_to": ",".join(NAMES), "num_samples": 8, "checkpoint_per_step": 1,
        "lr_schedule": "constant", "notify_url": SECRET,
    }  # fmt: skip
    for steps in STEPS:
        argv = run_flags(inputs, folder / "run", **flags, train_steps=steps, resume_with_changes=True)
        environment = clean_environment() | OFFLINE | {"DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "train_ppo.py", *argv]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        word = "new" if steps == 1 else "resumed"
        assert all(f"{name}, {word} run: " in done.stdout for name in NAMES)
        assert "\r" not in done.stdout + done.stderr  # no bars in logs
    return folder / "run"


def scores(run: Path) -> list[float]:
    return [row["score_mean"] for row in read_lines(run / "metrics.jsonl")]


def assert_safe(texts: list[str]) -> None:
    """Hostile text is there as it is, but for control characters."""
    assert any("<script>alert(1)</script> \\u001b[2J</s>Assistant:" in text for text in texts)
    assert not any("\x1b" in text for text in texts)


def test_wandb_holds_both_parts_of_the_run(run):
    ids = json.loads((run / "trackers.json").read_text())["ids"]
    parts = sorted((run / "wandb").glob(f"offline-run-*-{ids['wandb']}"))
    assert len(parts) == 2
    for part, score in zip(parts, scores(run), strict=True):
        content = (part / f"run-{ids['wandb']}.wandb").read_bytes()
        assert b"1_reward/score_mean" in content and json.dumps(score).encode() in content
        assert b"critic_pretrain_steps" in content and b"num_rollouts" in content
    tables = [json.loads(file.read_text()) for file in (run / "wandb").glob("offline-*/files/media/table/*.json")]
    columns = ["prompt", "answer", "score", "length", "kl", "nll", "ended"]
    assert sorted((table["columns"] for table in tables), key=len) == [columns] * 2 + [["held_out", *columns]] * 2
    assert_safe([row[0] for table in tables if len(table["columns"]) == 7 for row in table["data"]])


def test_mlflow_holds_one_run(run):
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    import mlflow

    client = mlflow.MlflowClient((run / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("ppo").experiment_id])
    assert found.info.run_name == run.name and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "1_reward/score_mean")
    assert [(each.step, each.value) for each in history] == list(enumerate(scores(run), 1))
    assert found.data.params["num_rollouts"] == "8" and found.data.params["notify_url"] == "***"
    folder = run / "mlruns" / found.info.experiment_id / found.info.run_id / "artifacts"
    table = json.loads((folder / "samples_000000_to_000099.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
    expected = [row for row in read_lines(run / "samples.jsonl") if not row.get("held_out")]
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in expected])
    assert_safe([row["prompt"] for row in rows])


def test_swanlab_holds_both_parts_of_the_run(run):
    ids = json.loads((run / "trackers.json").read_text())["ids"]
    parts = sorted((run / "swanlog").glob(f"run-*-{ids['swanlab']}"))
    assert len(parts) == 2
    for part, score in zip(parts, scores(run), strict=True):
        content = (part / f"run-{ids['swanlab']}.swanlab").read_bytes()
        assert b"1_reward/score_mean" in content and struct.pack("<d", score) in content
        assert "critic_pretrain_steps" in (part / "files" / "config.yaml").read_text()
    tables = [json.loads(file.read_text()) for file in (run / "swanlog").glob("run-*/media/echarts/*.json")]
    assert_safe([row.get("prompt", "") for table in tables for row in table["rowData"]])


def test_no_tracker_has_the_url_of_notices(run):
    files = [file for file in run.rglob("*") if file.is_file() and b"T0pSecret" in file.read_bytes()]
    assert files == []


def trackers(folder: Path, **changes):
    from utils.run.trackers import Trackers

    said = []
    return Trackers(RunFlags(model_save_path=str(folder), report_to="mlflow", **changes), said.append), said


def test_names_and_places_of_the_user(tmp_path, monkeypatch):
    """Flags win over variables, which win over stage and folder."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mine").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of a variable")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "of a variable, too")
    for number, changes in enumerate(({}, {"project": "mine", "run_name": "first"})):
        (tmp_path / str(number)).mkdir()
        opened, _ = trackers(tmp_path / str(number), **changes)
        opened.close()
        assert not (tmp_path / str(number) / "mlruns").exists()
    client = mlflow.MlflowClient((tmp_path / "mine").as_uri())
    found = {each.name: client.search_runs([each.experiment_id]) for each in client.search_experiments()}
    names = {name: [each.info.run_name for each in runs] for name, runs in found.items() if runs}
    assert names == {"of a variable": ["of a variable, too"], "mine": ["first"]}


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path):
    opened, said = trackers(tmp_path)
    opened.metrics(1, {"score_mean": 1.0, "return_noise": float("nan")})
    shutil.rmtree(tmp_path / "mlruns")
    for step in (2, 3):
        opened.metrics(step, {"score_mean": 1.0})
    opened.close()
    assert [line.split(" (")[0] for line in said[1:]] == ["warning: --report_to mlflow gets nothing more"]


def test_a_run_that_is_gone_is_named(tmp_path):
    trackers(tmp_path)[0].close()
    shutil.rmtree(tmp_path / "mlruns")
    with pytest.raises(UserError, match=r"--report_to mlflow: it cannot start .*does not exist"):
        trackers(tmp_path)
