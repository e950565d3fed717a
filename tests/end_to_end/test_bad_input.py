"""Bad input that shows only when models are loaded or a run is going: one line, exit code 2, no model.

The rest: tests/bad_inputs/.
"""

import math

import pytest
import torch

import ppo.compare
from tests.architectures.configs import tiny_config
from tests.architectures.folders import save_folder
from tests.helpers.tiny_run import as_argv, read_metrics, refusal, run_flags, write_json
from train_ppo import main


def test_an_existing_run_is_kept(inputs, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "config.json", {"of": "an earlier run"})
    error = refusal(main, run_flags(inputs, out), capfd)
    assert "--model_save_path" in error and "already holds a run" in error and "--overwrite" in error
    assert [file.name for file in out.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward_fn": "too_few"}, ["--reward_fn returned 1 numbers for 8 answers"]),
        ({"reward_fn": "words"}, ["--reward_fn must return a list of numbers"]),
        ({"reward_fn": "fails"}, ["--reward_fn failed: ", "reward_file.py:", "KeyError: 'no such word'"]),
        ({"reward_fn": "nan_for_rain"}, ["score of response", "not finite"]),
        # Adam's first step is as long as the learning rate: after it the next minibatch's loss is infinite.
        ({"critic_lr": 1e30, "zero_stage": 0}, ["the loss of the critic is not finite", "learning rate"]),
        ({"critic_lr": 1e30, "zero_stage": 2}, ["the loss of the critic is not finite", "learning rate"]),
    ],
    ids=str,
)
def test_what_shows_only_while_training_stops_the_run(inputs, tmp_path, capfd, changes, words):
    out = tmp_path / "out"
    if "reward_fn" in changes:
        changes = {"reward_fn": f"{inputs.reward_file}:{changes['reward_fn']}"}
    error = refusal(main, run_flags(inputs, out, **changes), capfd)
    assert all(word in error for word in words), error
    assert {file.name for file in out.iterdir()} <= {"config.json", "run_index.json", "tensorboard", "bad_batches"}


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


def family_folder(folder, family: str, **changes) -> str:
    """A tiny model of a family, with the policy's tokenizer."""
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        save_folder(config, folder)
    return str(folder)


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_a_policy_that_cannot_be_decoded(family, inputs, tmp_path, capfd):
    path, out = family_folder(tmp_path / family, family), tmp_path / "run"
    error = refusal(main, run_flags(inputs, out, policy_model_path=path), capfd)
    assert f"--policy_model_path {path}: " in error and "ForCausalLM cannot be decoded" in error
    assert not out.exists()
    flags = {"policies": [path, path], "data_path": inputs.prompts, "reward_model_path": inputs.reward, "dtype": "fp32"}
    error = refusal(ppo.compare.main, as_argv(flags | {"maxlen_prompt": 80, "maxlen_res": 8}), capfd)
    assert f"--policies {path}: " in error and "ForCausalLM cannot be decoded" in error


def test_a_policy_that_draws_experts_in_training_begins_at_a_ratio_of_1(inputs, tmp_path):
    path = family_folder(tmp_path / "phimoe", "phimoe", router_jitter_noise=0.5)
    flags = {"policy_model_path": path, "batch_size": 8, "gradient_checkpoint": True, "num_eval_prompts": 0}
    main(run_flags(inputs, tmp_path / "run", train_steps=1, **flags))
    (row,) = read_metrics(tmp_path / "run")
    assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-5) and row["approx_kl"] < 1e-8
