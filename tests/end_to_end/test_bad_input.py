"""What of a bad input shows only once a run is going: one line, exit code 2, no model. The rest: tests/bad_inputs/."""

import math
import re
from functools import partial

import pytest
from tqdm import tqdm

from tests.helpers.tiny_run import read_metrics, run_flags, write_json
from train_ppo import main


def error_of(argv: list[str], capfd, monkeypatch) -> str:
    """Runs train_ppo.py, which has to end with exit code 2, and gives its error output without the progress bar."""
    monkeypatch.setattr("utils.run.logger.tqdm", partial(tqdm, disable=True))
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capfd.readouterr().err


def test_an_existing_run_is_kept(inputs, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "config.json", {"of": "an earlier run"})
    error = error_of(run_flags(inputs, out), capfd, monkeypatch)
    assert re.fullmatch(r"error: --model_save_path .* already holds a run.*--overwrite\n", error)
    assert [file.name for file in out.iterdir()] == ["config.json"]


def stops_before_a_step(inputs, out, capfd, monkeypatch, **changes) -> str:
    """For what shows only while training: one line, no step in metrics.jsonl, no model. Gives the line."""
    error = error_of(run_flags(inputs, out, **changes), capfd, monkeypatch)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert {file.name for file in out.iterdir()} <= {"config.json", "tensorboard", "bad_batches"}
    return error


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        ("too_few", "--reward_fn returned 1 numbers for 8 answers"),
        ("words", "--reward_fn must return a list of numbers"),
        ("fails", r"--reward_fn failed: .*reward_file.py:\d+: KeyError: 'no such word'; fix"),
        ("nan_for_rain", "score of response.*not finite"),
    ],
)
def test_reward_functions_that_fail(inputs, tmp_path, capfd, monkeypatch, function, pattern):
    spec = f"{inputs.reward_file}:{function}"
    flags = {"reward_fn": spec}
    assert re.search(pattern, stops_before_a_step(inputs, tmp_path / "out", capfd, monkeypatch, **flags))


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_run_that_diverges_stops_with_a_line(inputs, tmp_path, capfd, monkeypatch, zero_stage):
    """Adam's first step is as long as the learning rate: after one of 1e30 the next minibatch's loss is infinite."""
    flags = {"critic_lr": 1e30, "zero_stage": zero_stage}
    error = stops_before_a_step(inputs, tmp_path / "out", capfd, monkeypatch, **flags)
    assert re.search("the loss of the critic is not finite.*Lower the learning rate", error)


def test_buffers_with_a_bad_score_are_left_out_whole(inputs, tmp_path, capfd):
    """Eight of eleven prompts a buffer: those with the prompt about rain are skipped, the steps made with others."""
    out = tmp_path / "run"
    main(run_flags(inputs, out, reward_fn=f"{inputs.reward_file}:nan_for_rain", skip_bad_batches=9, num_eval_prompts=0))
    left_out = sorted(path.name for path in (out / "bad_batches").iterdir())
    said = capfd.readouterr().out.count("of this step is not finite")
    assert len(left_out) == said > 0
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["bad_batches"] == said
    assert all(math.isfinite(value) for row in rows for value in row.values())
