"""A whole tiny run: what it writes, that it repeats, what leaves its numbers alone, how it is stopped."""

import json
import math
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppo.score
from data.template import encode_prompt
from tests.helpers.tiny_run import (
    HELD_OUT,
    REPOSITORY,
    assert_close,
    clean_environment,
    read_lines,
    read_metrics,
    run_flags,
)
from train_ppo import main
from utils.engine.memory import device_room
from utils.engine.state import same_weights
from utils.tokenizer import load_tokenizer

METRICS = {
    *("score_mean", "score_std", "kl_ref", "response_length", "perplexity", "perplexity_ref", "entropy"),
    *("eos_fraction", "policy_loss", "value_loss", "approx_kl", "clip_fraction", "value_clip_fraction", "ratio_mean"),
    *("advantage_mean", "advantage_std", "return_mean", "value_mean", "explained_variance", "grad_norm_policy"),
    *("grad_norm_critic", "lr_policy", "lr_critic", "samples_per_second", "tokens_per_second", "seconds_rollout"),
    *("seconds_score", "seconds_update", "memory_peak_gb"),
}


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """The folder of a run of two steps."""
    out = tmp_path_factory.mktemp("run") / "new"
    main(run_flags(inputs, out))
    return out


def test_metrics_samples_and_tensorboard(run):
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row.keys() >= METRICS
        assert all(math.isfinite(row[name]) for name in METRICS)
    assert rows[0]["kl_ref"] == 0.0 != rows[1]["kl_ref"]  # the first responses come from the reference itself
    assert rows[0]["perplexity"] == rows[0]["perplexity_ref"]
    assert rows[0]["lr_policy"] == 1e-4
    assert rows[1]["lr_policy"] == pytest.approx(1e-4 / math.sqrt(2))  # inverse square root after one step of warm-up
    assert 0.0 < rows[0]["eos_fraction"] < 1.0  # the inputs are such that both endings occur

    samples = read_lines(run / "samples.jsonl")
    assert [row["step"] for row in samples if not row.get("held_out")] == [1] * 4 + [2] * 4
    assert all(isinstance(row["answer"], str) and math.isfinite(row["score"]) for row in samples)
    seen = [f"<s>Human:{question}</s>Assistant:" for (question,) in HELD_OUT]
    assert [row["prompt"] for row in samples if row.get("held_out")] == seen * 2
    turns = (
        "<s>Human:Hi</s>Assistant:Hello, what can I do for you?</s>"
        "Human:Tell me a short story about a fox.</s>Assistant:"
    )
    assert turns in [row["prompt"] for row in samples]

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("1_reward/score_mean")}
    assert scalars == pytest.approx({row["step"]: row["score_mean"] for row in rows}, rel=1e-6)
    assert "samples/text_summary" in events.Tags()["tensors"]
    groups = {tag.split("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {"1_reward", "2_evaluation", "3_policy", "4_critic", "5_speed"}


def test_a_sample_says_how_long_it_is_how_far_from_the_reference_and_how_it_ended(inputs, tmp_path):
    """All of a buffer, so that the metrics are their means; those of an evaluation, too."""
    main(run_flags(inputs, tmp_path / "run", num_samples=8))
    rows, samples = read_metrics(tmp_path / "run"), read_lines(tmp_path / "run" / "samples.jsonl")
    for held_out, prefix in ((False, ""), (True, "eval_")):
        for step, metrics in enumerate(rows, 1):
            found = [row for row in samples if row["step"] == step and row.get("held_out", False) is held_out]
            assert len(found) == (3 if held_out else 8) and all(type(row["ended"]) is bool for row in found)
            for key, name in (("length", "response_length"), ("kl", "kl_ref"), ("ended", "eos_fraction")):
                mean = sum(row[key] for row in found) / len(found)
                assert metrics[prefix + name] == pytest.approx(mean, rel=1e-5, abs=1e-6), (name, step)
            assert all(row["length"] == 12 for row in found if not row["ended"])  # --maxlen_res


@pytest.mark.parametrize("name", ["best", "final"])
def test_exported_folders_load_elsewhere(run, inputs, name):
    model = AutoModelForCausalLM.from_pretrained(run / name)
    before = AutoModelForCausalLM.from_pretrained(inputs.policy)
    settings = model.generation_config  # nothing of the run's own --maxlen_res, nor of its evaluations
    assert (settings.eos_token_id, settings.bos_token_id, settings.max_new_tokens) == (2, 1, None)
    assert settings.temperature is settings.top_p is settings.repetition_penalty is None
    assert model.dtype == before.dtype
    moved = (model.lm_head.weight - before.lm_head.weight).abs().max()
    assert 0.0 < moved < 1e-3  # Adam's steps are about the learning rate: four of 1e-4
    tokenizer, ours = AutoTokenizer.from_pretrained(run / name), load_tokenizer(str(inputs.policy), "moss_en")
    text = "How do I bake  bread? 你好 🙂"
    assert tokenizer(text, add_special_tokens=False).input_ids == ours(text, add_special_tokens=False).input_ids
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, ("Hi", ":)", "?"), strict=True)]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt == encode_prompt(ours, turns, "moss_en")
    assert not list(run.glob("*.partial"))


def test_a_seed_repeats_the_run_and_another_does_not(run, inputs, tmp_path):
    main(run_flags(inputs, tmp_path / "again", train_steps=1, seed=8))
    main(run_flags(inputs, tmp_path / "again", overwrite=True))  # nothing of the earlier run is left
    main(run_flags(inputs, tmp_path / "other", seed=8))
    assert read_metrics(tmp_path / "again") == read_metrics(run)
    assert read_metrics(tmp_path / "other")[0]["score_mean"] != read_metrics(run)[0]["score_mean"]
    assert read_lines(tmp_path / "again" / "samples.jsonl") == read_lines(run / "samples.jsonl")


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout_batch_size": 8, "micro_batch_tokens": 4000},
        {"rollout_batch_size": "auto", "gradient_checkpoint": "auto"},
        {"offload_frozen": True},
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"reuse_sampler_logprobs": True},
        pytest.param({"compile": True, "gradient_checkpoint": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_changes_speed_and_memory_changes_no_number(run, inputs, tmp_path, changes):
    torch._dynamo.reset()
    main(run_flags(inputs, tmp_path / "run", **changes))
    assert_close(tmp_path / "run", run, rel=1e-4, abs=1e-4 if "compile" in changes else 2e-5)
    if changes.keys() & {"compile", "reuse_sampler_logprobs"}:
        assert read_metrics(tmp_path / "run") != read_metrics(run)  # else they were not on


def test_one_pass_for_policy_and_reference_while_they_are_the_same(inputs, tmp_path, monkeypatch):
    """In the critic's own step, its evaluation, and the first of the policy's."""
    asked = []

    def never(policy, reference):
        asked.append(same_weights(policy, reference))
        return False

    main(run_flags(inputs, tmp_path / "one", critic_pretrain_steps=1))
    monkeypatch.setattr(ppo.score, "same_weights", never)
    main(run_flags(inputs, tmp_path / "two", critic_pretrain_steps=1))
    assert read_metrics(tmp_path / "one") == read_metrics(tmp_path / "two")
    assert asked == [True, True, True, False, False, False]  # a step and its evaluation, three times


@pytest.mark.gpu
def test_sizes_come_from_the_memory_of_a_gpu(run, inputs, tmp_path, capsys):
    main(run_flags(inputs, tmp_path / "run", rollout_batch_size="auto", gradient_checkpoint="auto"))
    printed = capsys.readouterr().out
    assert "--rollout_batch_size auto: 8 sequences are decoded at once on each GPU" in printed  # a slot for each prompt
    assert printed.count("recomputes 0 of 2 layers") == 2
    assert_close(tmp_path / "run", run, rel=1e-4, abs=2e-5)
    assert 0 < device_room() < 0.9 * torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGUSR1, 138, "SIGUSR1")],
)
def test_a_signal_to_a_command_saves_and_leaves_no_debris(inputs, tmp_path, number, code, name):
    out, pipes = tmp_path / "run", {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "train_ppo.py", *run_flags(inputs, out, train_steps=100000)]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment(), **pipes)
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert "stopping once the run can be resumed from there" in stderr and "Traceback" not in stderr
    (steps,) = re.findall(rf"stopped by {name} after step (\d+); .*the same command resumes", stdout)
    assert len(read_metrics(out)) in (int(steps), int(steps) - 1)  # the latter if it came in the evaluation
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step_{steps}"]
    written = {path.name for path in out.iterdir()}
    names = {"config.json", "run_index.json", "metrics.jsonl", "samples.jsonl", "tensorboard", "best", "checkpoints"}
    names |= {"report.html"}
    assert written <= names
    assert json.loads((out / "config.json").read_text())["argv"] == command[1:]
    assert "--maxlen_res 12" in stdout and "--temperature" not in stdout


def test_out_of_time_after_the_last_step_is_a_finished_run(inputs, tmp_path, capfd):
    """Else its code is 75: tests/end_to_end/test_resume.py."""
    main(run_flags(inputs, tmp_path / "run", train_steps=1, max_hours=1e-9))
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert "stopped by" not in capfd.readouterr().out
