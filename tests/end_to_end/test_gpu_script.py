"""tests/gpu.sh on a CPU: every check at toy sizes; and what the runner makes of checks that fail, die or hang."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tests.gpu.__main__ as runner
from tests.helpers.tiny_run import REPOSITORY, clean_environment, read_lines

FIGURES = {  # what each check must have found out, at the least
    "machine": {"bf16_tflops", "device_copy_tb_per_second", "pinned_to_host_gb_per_second"},
    "parity": {"zero_0", "zero_1", "zero_2", "zero_3", "offload_frozen", "reuse", "offload_optimizer"},
    "precision": {"ratio_off_by", "approx_kl", "repeats", "resumes", "sigterm_exit_code"},
    "decoding": {"tiny_2_24_equal_ragged_ms", "tiny_2_24_ragged_straight_ms", "tiny_2_24_equal_share"},
    "attention": {"mha_2_equal_ragged_share", "gqa_2_ragged_masked_share"},
    "frozen": {"old_s", "new_s", "new_once_s"},
    "passes": {"padded_score_share", "joined_update_share", "joined_update_gib_of_planned", "logprobs_apart"},
    "adapters": {"off_by", "update_share", "update_gib_of_planned"},
    "optimizer": {
        "plain_s",
        "chunked_s",
        "largest_difference_in_lr",
        "states_back_s",
        "background_waited_s",
        "foreground_gb_per_s",
    },
    "against_trl": {"aim_ratio"},  # the rest where this Python has TRL
    "synchronisations": {"waits_per_token", "waits_per_look", "waits_per_phase"},
    "two_ranks": {"zero_2", "zero_3"},
    "vllm": set(),  # the rest where this Python has vLLM
    "demo": {"steps", "samples_per_second", "score_first", "score_last"},
}
FAKES = {
    "machine": "report(rate=1.5)\n    subprocess.Popen(['sleep', '987654'])",
    "parity": "report.expect(1 + 1 == 3, 'sum: 3 expected, got 2')\n    report(after=True)",
    "precision": "report(before=1)\n    os.kill(os.getpid(), 11)",
    "decoding": "report(before=1)\n    {}['nothing']",
    "attention": "sys.exit(3)",
    "demo": "report(before=1)\n    time.sleep(60)",
}


@pytest.mark.slow
def test_every_check_at_toy_sizes(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "tests/gpu.sh", "--cpu", "--minutes", "20", "--out", str(tmp_path)],
        cwd=REPOSITORY, env=clean_environment() | {"PATH": path}, capture_output=True, text=True, timeout=1300,
    )  # fmt: skip
    first, *rows = read_lines(tmp_path / "gpu.jsonl")
    assert first["card"] == "CPU" and first["versions"].keys() >= {"torch", "transformers", "deepspeed"}
    assert [row["error"] for row in rows if not row["ok"]] == [], (tmp_path / "gpu.log").read_text()[-3000:]
    assert result.returncode == 0, result.stderr
    found = {row["check"]: row["figures"].keys() for row in rows}
    assert [(name, keys - found[name]) for name, keys in FIGURES.items() if keys - found[name]] == []
    assert f"{len(rows)} of {len(rows)} checks passed" in result.stdout


def test_checks_that_fail_die_or_hang_leave_a_line_and_no_process(tmp_path):
    package, out = tmp_path / "tests" / "gpu", tmp_path / "out"
    package.mkdir(parents=True)
    (tmp_path / "tests" / "__init__.py").touch()
    for name in ("__init__", "__main__", "child", "report"):
        shutil.copy(REPOSITORY / "tests" / "gpu" / f"{name}.py", package)
    for name, body in FAKES.items():
        (package / f"{name}.py").write_text(
            f"import os, subprocess, sys, time\n\ndef check(toy, report):\n    {body}\n"
        )
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.gpu", "--cpu", "--only", *FAKES, "--out", str(out), "--minutes", "0.15"]
    result = subprocess.run(command, cwd=tmp_path, env=clean_environment() | {"PYTHONPATH": ""}, capture_output=True)
    assert time.monotonic() - began < 40
    assert result.returncode == 1
    rows = {row["check"]: row for row in read_lines(out / "gpu.jsonl")[1:]}
    assert list(rows) == list(FAKES)
    assert [name for name, row in rows.items() if row["ok"]] == ["machine"]
    assert rows["machine"]["figures"] == {"rate": 1.5}
    assert (rows["parity"]["error"], rows["parity"]["figures"]) == ("sum: 3 expected, got 2", {"after": True})
    assert "exit code -11" in rows["precision"]["error"] and rows["precision"]["figures"] == {"before": 1}
    assert "KeyError: 'nothing'" in rows["decoding"]["error"] and rows["decoding"]["figures"] == {"before": 1}
    assert "SystemExit: 3" in rows["attention"]["error"]
    assert "its limit of" in rows["demo"]["error"] and rows["demo"]["figures"] == {"before": 1}
    assert 'demo.py", line 5 in check' in (out / "gpu.log").read_text()  # where it was when it was ended
    assert not subprocess.run(["pgrep", "-f", "sleep 987654"], capture_output=True).stdout


@pytest.mark.parametrize("path", ["", os.environ["PATH"]], ids=["no git", "no repository"])
def test_the_header_where_there_is_no_commit(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("COMMIT", "abc")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    assert runner.header(argparse.Namespace(cpu=True))["commit"] == "abc"
