"""Signs of collapse in real runs: each alarm rings, and warns, stops, or takes the run back to its last checkpoint."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_run import final_weights, read_lines, read_metrics, refusal, run_flags
from train_ppo import main

FLAGS = {"train_steps": 5, "checkpoint_per_step": 2, "num_eval_prompts": 0, "alarm_score_std": 1e-6}

# The same score for all answers to a buffer: in the third, or from the third on.
ALIKE = """
buffers = 0

def vowels(prompts, answers):
    global buffers
    buffers += 1
    return [sum(letter in "aeiou" for letter in answer) / (1 + len(answer)) for answer in answers]

def third(prompts, answers):
    scores = vowels(prompts, answers)
    return [0.5 for _ in answers] if buffers == 3 else scores

def from_third(prompts, answers):
    scores = vowels(prompts, answers)
    return [0.5 for _ in answers] if buffers >= 3 else scores

def good_then_alike(prompts, answers):  # called for a step's buffer, then for its evaluation: step 3's, then step 4
    scores = vowels(prompts, answers)
    return [9.0 for _ in answers] if buffers in (7, 8) else [x + 8 * (buffers == 6) for x in scores]
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("functions") / "alike.py"
    file.write_text(ALIKE)
    return file


def test_every_alarm_warns(inputs, tmp_path, capfd):
    alarms = {"alarm_kl": 1e-4, "alarm_perplexity": 1e6, "alarm_eos": 1, "alarm_length": 80, "alarm_score_std": 1e6}
    main(run_flags(inputs, tmp_path / "run", **FLAGS | alarms | {"lr": 1e-2}))
    text = capfd.readouterr().out
    names = ["kl_ref", "perplexity", "eos_fraction", "response_length", "score_std"]
    for name, flag in zip(names, alarms, strict=True):
        assert re.search(rf"warning: step \d looks like a collapse: .*{name} [\d.e-]+ is past --{flag}", text), flag
    assert len(read_metrics(tmp_path / "run")) == 5


def test_an_alarm_stops_the_run_where_it_is_to(inputs, functions, tmp_path, capfd):
    """At once, or after as many rollbacks as are allowed, or where there is no checkpoint to go back to."""
    out = tmp_path / "run"
    argv = run_flags(inputs, out, **FLAGS, reward_fn=f"{functions}:third", on_collapse="stop")
    assert "step 3 looks like a collapse: score_std 0 is past --alarm_score_std 1e-06" in refusal(main, argv, capfd)
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_2"]
    assert "score_std was past --alarm_score_std 1e-06 at step 3" in (out / "report.html").read_text("utf-8")
    flags = FLAGS | {"reward_fn": f"{functions}:from_third", "on_collapse": "rollback"}
    for every, rollbacks in ((2, 3), (4, 0)):
        argv = run_flags(inputs, tmp_path / f"run{every}", **flags | {"checkpoint_per_step": every})
        error = refusal(main, argv, capfd)
        assert re.search(rf"step 3 looks like a collapse: .*--on_collapse rollback, {rollbacks} rollbacks", error)


def change_state(checkpoint: Path, **changes) -> None:
    """Other numbers in a checkpoint's state.json, and the manifest that fits them."""
    file = checkpoint / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    content = file.read_bytes()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_rollback_is_the_last_checkpoint_with_the_prompts_that_come_next(inputs, functions, tmp_path, capfd):
    out = tmp_path / "run"
    main(run_flags(inputs, out, **FLAGS, reward_fn=f"{functions}:third", on_collapse="rollback"))
    text = capfd.readouterr().out
    assert "warning: step 3 looks like a collapse: score_std 0" in text
    assert "back at step 2, rollback 1 of 3" in text
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3, 4, 5]
    assert sorted({row["step"] for row in read_lines(out / "samples.jsonl")}) == [1, 2, 3, 4, 5]
    assert json.loads((out / "checkpoints" / "step_4" / "state.json").read_text())["rollbacks"] == 1

    other, expected = tmp_path / "other", tmp_path / "expected"
    (tmp_path / "f.py").write_text(ALIKE.replace("buffers == 3", "False"))
    flags = FLAGS | {"reward_fn": f"{tmp_path}/f.py:third"}  # of the same name, which is that of a metric
    main(run_flags(inputs, other, **flags))
    assert [row | {"rollbacks": 0} for row in read_metrics(other)[:2]] == read_metrics(out)[:2]
    change_state(other / "checkpoints" / "step_2", next_place=3 * 8)  # passes over the buffer that rang
    main(run_flags(inputs, expected, **flags, resume=other / "checkpoints" / "step_2"))
    rows = read_metrics(out)
    assert [row.pop("rollbacks") for row in rows] == [0, 0, 1, 1, 1] and rows[2:] == read_metrics(expected)
    page = (out / "report.html").read_text("utf-8")
    assert "Rollbacks: 1. After an alarm the run went back" in page and "Finished: all 5 steps" in page
    weights, others = final_weights(out), final_weights(expected)
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def test_a_collapse_is_never_the_best(inputs, functions, tmp_path, capfd):
    """Whatever its score. And what a rollback takes back stays in best/, and is what comes later is measured by."""
    out = tmp_path / "run"
    flags = FLAGS | {"num_eval_prompts": 3, "save_per_step": 1, "on_collapse": "rollback"}
    main(run_flags(inputs, out, **flags, reward_fn=f"{functions}:good_then_alike"))
    text = capfd.readouterr().out
    assert "back at step 2, rollback 1 of 3" in text
    found = re.findall(r"step (\d): held-out score ([\d.]+).*?(best so far)?\)?\n", text)
    assert [step for step, *_ in found] == ["1", "2", "3", "4", "3", "4", "5"]
    scores, best = [float(score) for _, score, _ in found], [bool(words) for *_, words in found]
    assert best[2:] == [True, False, False, False, False]
    assert scores[3] == 9.0 > scores[2] > 8.0 > max(scores[4:])
    kept = json.loads((out / "checkpoints" / "step_4" / "state.json").read_text())["best_score"]
    assert kept == pytest.approx(scores[2], abs=1e-3)
