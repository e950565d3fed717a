"""Trainers write report.html at their end; `python -m ppo.report` makes it anew, for runs of all stages."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reward.train
import sft.train
from ppo.report import main
from tests.helpers.tiny import SAMPLES, tiny_llama_folder
from tests.helpers.tiny_run import (
    REPOSITORY,
    clean_environment,
    fit_flags,
    read_lines,
    refusal,
    run_flags,
    write_json,
)
from train_ppo import main as train_ppo
from utils.run.folder import check_owned


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama_folder(tmp_path_factory.mktemp("base"))


def titles(page: str) -> list[str]:
    return [found.strip() for found in re.findall(r"<figcaption>([\w ,]+)", page)]


def test_ppo_with_changed_flags_and_samples_side_by_side(inputs, tmp_path, capfd):
    out = tmp_path / "run"
    train_ppo(run_flags(inputs, out, critic_pretrain_steps=1))
    said = capfd.readouterr().out
    (line,) = (line for line in said.splitlines() if "everything is in" in line)
    assert line.endswith(
        f"everything is in {out}: report.html (open it in a browser), best/, final/, metrics.jsonl, samples.jsonl; "
        f"tensorboard --logdir {out}/tensorboard"
    )
    page = (out / "report.html").read_text("utf-8")
    assert "Finished: all 3 steps are done" in page and "Shaded: only the critic trains." in page
    wanted = {"Score", "KL to the reference, nats per response", "Value loss", "Entropy, nats per token"}
    assert wanted | {"Clip fraction", "Seconds per step"} <= set(titles(page))
    assert "<td>--critic_lr</td><td>0.001</td><td>1.65e-06</td>" in page and "<td>--gamma</td>" not in page
    rows = read_lines(out / "samples.jsonl")
    held_out = [row for row in rows if row.get("held_out")]
    sides = re.search(
        r'<article class="many"><div class="prompt"><pre>[^<]*Human:Help&lt;[^<]*</pre>.*?</article>', page, re.DOTALL
    )[0]
    assert sides.count("<pre>") == 1 + len([row for row in held_out if "Human:Help<" in row["prompt"]]) == 4
    best = max((row for row in read_lines(out / "metrics.jsonl")), key=lambda row: row["eval_score_mean"])
    assert f'<span class="small">Best step</span><b>{best["step"]}</b><span class="small">best/ holds it' in page
    assert best["eval_num_prompts"] == 3

    kept = (out / "report.html").read_bytes()
    command = ["bash", "-c", 'source utils/launch.sh; end_demo "$1"', "-", out]  # the end of run_en.sh --demo
    settings = clean_environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=REPOSITORY, env=settings, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"written: {out}/report.html (open it in a browser)",
        f"talk to the model: python -m ppo.chat --model {out}/final",
    ]
    assert (out / "report.html").read_bytes() == kept
    assert refusal(main, [str(out), "--output", str(tmp_path)], capfd).endswith("is a folder; pass the name of a file")


def test_sft_and_reward_runs_on_one_page(base, tmp_path):
    ends = {"context_truncate": 256, "save_per_step": 2}
    runs = [tmp_path / "sft", tmp_path / "reward"]
    sft.train.main(fit_flags(base, SAMPLES / "en" / "dialogues", runs[0], **ends))
    reward.train.main(fit_flags(base, SAMPLES / "en" / "preferences", runs[1], **ends))
    pages = [(run / "report.html").read_text("utf-8") for run in runs]
    assert titles(pages[0]) == [
        "Loss", "Accuracy of tokens", "Perplexity", "Gradient norm", "Learning rate", "Tokens per second", "Memory, GB",
    ]  # fmt: skip
    assert {"Loss", "Accuracy", "Score difference", "Calibration error"} <= set(titles(pages[1]))
    assert "Finished: all 3 steps" in pages[0] and "<summary>reference</summary>" in pages[0]
    assert 'data-held="1"' in pages[0] and 'data-held="0"' not in pages[0]  # all answers are to held-out prompts
    main([*map(str, runs), "--output", str(tmp_path / "both.html")])
    page = (tmp_path / "both.html").read_text("utf-8")
    assert all(f"<h2>{run}</h2>" in page for run in runs)


def test_a_report_that_cannot_be_written_does_not_stop_a_run(inputs, tmp_path, capfd):
    out = tmp_path / "run"
    (out / "report.html.partial" / "mine").mkdir(parents=True)
    train_ppo(run_flags(inputs, out, train_steps=1, num_eval_prompts=0))
    said = capfd.readouterr().out
    assert f"warning: report.html was not written: {out}/report.html cannot be written: Is a directory" in said
    assert f"everything is in {out}: final/" in said and (out / "final" / "model.safetensors").is_file()


def test_the_report_is_a_file_of_the_run(inputs, tmp_path, capfd):
    """It is replaced with the run, while one of the user's is not."""
    out = tmp_path / "run"
    flags = {"train_steps": 1, "num_eval_prompts": 0}
    out.mkdir()
    (out / "report.html").write_text("mine")
    error = refusal(train_ppo, run_flags(inputs, out, **flags, overwrite=True), capfd)
    assert "report.html was not written by a run; move it" in error
    (out / "report.html").unlink()
    train_ppo(run_flags(inputs, out, **flags))
    index = json.loads((out / "run_index.json").read_text())
    del index["names"]["report.html"]  # now as older versions left it, where only ppo.report made the page
    check_owned(str(write_json(out / "run_index.json", index).parent))
    write_json(out / "run_index.json", index | {"names": index["names"] | {"report.html": []}})
    (out / "report.html").write_text("of the run before")
    nan = f"{inputs.reward_file}:always_nan"
    refusal(train_ppo, run_flags(inputs, out, **flags, overwrite=True, reward_fn=nan), capfd)
    assert not (out / "report.html").exists()
