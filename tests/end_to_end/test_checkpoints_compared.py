"""ppo.compare --checkpoints on tiny runs that kept their checkpoints, as a user types it."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppo.compare import main
from ppo.kept_policies import kept_policies, load_kept
from tests.helpers.tiny_run import HELD_OUT, as_argv, final_weights, policy_folder, refusal, run_flags
from tests.helpers.tiny_run import tiny_reward_model as reward_model
from train_ppo import main as train_ppo
from utils.files import read_json
from utils.models.export import saved_tensors
from utils.tokenizer import load_tokenizer

KEPT = {"train_steps": 3, "checkpoint_per_step": 1, "keep_checkpoints": 9, "lr": 3e-3}


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """Three steps under ZeRO-2, all checkpoints kept."""
    out = tmp_path_factory.mktemp("over") / "run"
    train_ppo(run_flags(inputs, out, zero_stage=2, **KEPT))
    return out


def flags_of(inputs, run, **changes) -> list[str]:
    flags = {"checkpoints": run, "heldout_reward_fn": f"{inputs.reward_file}:vowels", "rollout_batch_size": 2}
    return as_argv(flags | changes)


def weights_of_checkpoint(run, step: int, policy) -> dict[str, torch.Tensor]:
    saved = read_json(run / "config.json")
    kept = next(
        x for x in kept_policies(str(run), str(policy), saved | {"train_steps": 99}) if x.name == f"step {step}"
    )
    config = SimpleNamespace(
        checkpoints=str(run), policy_model_path=str(policy), dtype="fp32", attn_implementation=None, maxlen_prompt=80,
        seed=1,
    )  # fmt: skip
    model = load_kept(kept, config, saved, load_tokenizer(str(policy), "moss_en"))
    return saved_tensors(model.lm)


@pytest.mark.parametrize(
    "changes", [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}, {"lora_rank": 2}], ids=str
)
def test_weights_of_a_checkpoint_equal_those_that_were_exported(inputs, run, changes, tmp_path):
    out = run
    if changes != {"zero_stage": 2}:
        out = tmp_path / "run"
        train_ppo(run_flags(inputs, out, **KEPT | {"train_steps": 1, "num_eval_prompts": 0} | changes))
    step = 3 if out == run else 1
    exported, found = final_weights(out), weights_of_checkpoint(out, step, inputs.policy)
    start = load_file(inputs.policy / "model.safetensors")
    assert exported.keys() == found.keys()
    assert [name for name, x in exported.items() if not torch.equal(x, found[name])] == []
    assert any(not torch.equal(x, start[name]) for name, x in exported.items())


def test_every_kept_policy_is_scored(inputs, run, tmp_path, capsys):
    heldout = reward_model(tmp_path / "<script>\x1b[2J", 400, seed=5)
    output = tmp_path / "out" / "over.json"
    main(flags_of(inputs, run, heldout_reward_model_path=heldout, output=output))
    report, shown = json.loads(output.read_text("utf-8")), capsys.readouterr().out
    names = ["start", "step 1", "step 2", "final", "best"]
    assert [one["name"] for one in report["policies"]] == names and report["prompts"] == len(HELD_OUT)
    assert report["proxy"] == [str(inputs.reward)]  # of config.json: --critic_model_path
    assert report["heldout"] == [str(heldout), f"{inputs.reward_file}:vowels"]
    start, *others = report["policies"]
    assert start["sqrt_kl"] == [0.0] * 3 and all(x == [0.0] * 3 for x in start["gains"].values())
    assert len({one["scores"]["proxy"] for one in report["policies"]}) > 2 and others[2]["kl"][0] != 0.0
    assert "compared on the held-out data" in shown and f"take: {report['take']}" in shown
    assert "<script>\\u001b[2J" in shown and "\x1b" not in shown + output.read_text("utf-8")
    assert (tmp_path / "out" / "over.png").read_bytes().startswith(b"\x89PNG")


def test_kl_is_that_of_two_policies(inputs, run, tmp_path):
    """ppo.compare measures the KL of plain samples of final/ to the first policy: the same samples, by seed."""
    for_two, for_all = tmp_path / "two.json", tmp_path / "all.json"
    main(flags_of(inputs, run, output=for_all, rollout_batch_size=3))
    flags = {"policies": [inputs.policy, run / "final"], "reward_model_path": inputs.reward, "output": for_two}
    main(as_argv(flags | {"data_path": inputs.prompts, "dtype": "fp32", "maxlen_prompt": 80, "maxlen_res": 12}))
    found = next(one for one in json.loads(for_all.read_text("utf-8"))["policies"] if one["name"] == "final")
    assert found["kl"][0] == pytest.approx(json.loads(for_two.read_text("utf-8"))["table"]["kl"]["after"][0], abs=1e-5)


def test_run_of_a_reward_function_does_not_run_it_unasked(inputs, tmp_path, capfd):
    out = tmp_path / "run"
    flags = KEPT | {"train_steps": 1, "reward_fn": f"{inputs.reward_file}:vowels"}
    train_ppo(run_flags(inputs, out, **flags))
    line = refusal(main, flags_of(inputs, out), capfd)
    assert f"--reward_fn {inputs.reward_file}:vowels; pass it" in line
    again = {"reward_fn": f"{inputs.reward_file}:vowels"}
    assert "the run was trained on it" in refusal(main, flags_of(inputs, out, **again), capfd)
    output = tmp_path / "over.json"
    picture = output.with_suffix(".png")
    picture.mkdir()
    flags = flags_of(inputs, out, heldout_reward_fn=f"{inputs.reward_file}:short", output=output, **again)
    assert "over.png is a folder" in refusal(main, flags, capfd)
    picture.rmdir()
    main(flags)
    for one in json.loads(output.read_text("utf-8"))["policies"]:
        assert 0 < one["scores"]["proxy"] < 1 and one["scores"][f"{inputs.reward_file}:short"] < 0


def test_prompts_without_a_score_are_left_out(inputs, run, tmp_path, capfd):
    """An answer without a score leaves out its prompt; a pipe gets the JSON alone, and no picture."""
    file, pipe = tmp_path / "judge.py", tmp_path / "pipe"
    file.write_text(
        "def some(prompts, answers): return [None if t[-1]['content'] == 'Help' else 1.0 for t in prompts]\n"
        "def none(prompts, answers): return [None for _ in answers]\n"
    )
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    main(flags_of(inputs, run, heldout_reward_fn=f"{file}:some", output=pipe))
    assert json.loads(os.read(reader, 1 << 16))["prompts"] == len(HELD_OUT) - 1
    os.close(reader)
    assert f"1 of {len(HELD_OUT)} prompts are left out" in capfd.readouterr().out
    assert sorted(x.name for x in tmp_path.iterdir()) == ["judge.py", "pipe"]
    line = refusal(main, flags_of(inputs, run, heldout_reward_fn=f"{file}:none"), capfd)
    assert "--num_prompts 256: 0 of 3 prompts have a score" in line


def test_damaged_and_foreign_folders_are_refused(inputs, run, tmp_path, capfd):
    assert "no config.json there" in refusal(main, flags_of(inputs, inputs.prompts), capfd)
    assert "pass --heldout_reward_model_path" in refusal(main, ["--checkpoints", str(run)], capfd)
    line = refusal(main, flags_of(inputs, run, heldout_reward_model_path=inputs.reward), capfd)
    assert "the run was trained on it" in line
    copy = shutil.copytree(run, tmp_path / "copy")
    for name in ("final", "best"):
        shutil.rmtree(copy / name)
    file = copy / "checkpoints" / "step_2" / "policy-rank0.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.startswith("weight/"))
    tensors[name][0] = float("nan")
    save_file(tensors, file)
    assert "step_2 holds weights that are not finite" in refusal(main, flags_of(inputs, copy), capfd)
    file.write_bytes(file.read_bytes()[:1000])
    assert "step_2 is damaged (policy" in refusal(main, flags_of(inputs, copy), capfd)
    wider = policy_folder(tmp_path / "wider", 1, intermediate_size=96)
    assert "step_1 does not fit" in refusal(main, flags_of(inputs, copy, policy_model_path=wider), capfd)
    shutil.rmtree(copy / "checkpoints")
    assert "no checkpoint of a policy" in refusal(main, flags_of(inputs, copy), capfd)
