"""SFT, reward model and PPO with adapters: four models on one base, against models of their own."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ppo.build
from ppo.config import AMOUNTS, PRESETS, PPOConfig
from ppo.critic import main as train_critic
from ppo.fit_critic import is_pretrained
from ppo.models import load_models
from ppo.planning.plan import plan
from reward.model import load_scalar_model
from reward.train import main as train_reward
from sft.train import main as train_sft
from tests.helpers.tiny_run import assert_same_run, fit_flags, read_metrics, run_flags, write_json
from train_ppo import main as train_ppo
from utils.flags.parser import parse_args
from utils.merge_adapter import main as merge
from utils.tokenizer import load_tokenizer

LORA = {"lora_rank": 4, "lr": 1e-2}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def adapters(inputs, tmp_path_factory):
    """Folders of an SFT run and a reward run on the same model: whole models in final/, adapters beside them."""
    folder = tmp_path_factory.mktemp("adapters")
    pairs = [{"prompt": f"Number {i}?", "chosen": "good good", "rejected": "bad"} for i in range(12)]
    train_sft(fit_flags(inputs.policy, inputs.dialogues, folder / "sft", export="both", **LORA))
    data = write_json(folder / "pairs.json", pairs)
    train_reward(fit_flags(inputs.policy, data, folder / "reward", export="both", **LORA))
    return folder


def test_whole_model_and_adapter_are_the_same_function(adapters):
    whole = AutoModelForCausalLM.from_pretrained(adapters / "sft" / "final")
    part = AutoPeftModelForCausalLM.from_pretrained(adapters / "sft" / "final_adapter")
    torch.testing.assert_close(whole(IDS).logits, part(IDS).logits)


def ppo_run(inputs, adapters, out, monkeypatch, **changes):
    """Metrics, models and folder of a run whose four models are the base with adapters."""
    built, build = [], ppo.build.load_models
    monkeypatch.setattr(ppo.build, "load_models", lambda *args: built.append(build(*args)) or built[-1])
    paths = {"policy_model_path": adapters / "sft" / "final_adapter"}
    paths |= {"critic_model_path": adapters / "reward" / "final_adapter"}
    train_ppo(run_flags(inputs, out, **paths | LORA | {"train_steps": 3, "critic_pretrain_steps": 1} | changes))
    return read_metrics(out), built[0]


def test_four_models_share_one_base(inputs, adapters, tmp_path, monkeypatch):
    shared, models = ppo_run(inputs, adapters, tmp_path / "shared", monkeypatch)
    apart, others = ppo_run(inputs, adapters, tmp_path / "apart", monkeypatch, share_base="never")
    parts = (models.policy.module, models.critic.module, models.reference.model, models.reward.members[0].model.model)
    assert len({id(part.decoder) for part in parts}) == 1
    assert others.critic.module.decoder is not others.policy.module.decoder
    for row, other in zip(shared, apart, strict=True):
        for name in ("score_mean", "kl_ref", "value_loss", "policy_loss", "grad_norm_policy", "grad_norm_critic"):
            assert row.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=1e-3, abs=1e-4), (row["step"], name)
    assert shared[0]["kl_ref"] == 0.0 < shared[-1]["kl_ref"]


@torch.no_grad()
def outputs(models):
    """Logits of policy and reference, scalars of critic and reward model."""
    ones, results = torch.ones_like(IDS), {}
    for name, model in (("policy", models.policy.module), ("reference", models.reference.model)):
        model.activate()
        results[name] = model.lm(IDS).logits
    for name, model in (("critic", models.critic.module), ("reward", models.reward.members[0].model.model)):
        results[name] = model(IDS, ones)
    return results


@pytest.mark.parametrize("still", ["policy", "critic"])
def test_no_adapter_acts_in_another_model(inputs, adapters, tmp_path, monkeypatch, still):
    """A model whose rate is nearly 0 stays as it was, whatever the other one learns on the same base, which stays."""
    rate = {"policy": {"lr": 1e-30}, "critic": {"critic_lr": 1e-30}}[still]
    _, models = ppo_run(inputs, adapters, tmp_path / "run", monkeypatch, critic_pretrain_steps=0, **rate)
    found = outputs(models)
    assert torch.equal(found["policy"], found["reference"]) is (still == "policy")
    assert torch.equal(found["critic"], found["reward"]) is (still == "critic")
    sft = AutoPeftModelForCausalLM.from_pretrained(adapters / "sft" / "final_adapter")
    torch.testing.assert_close(found["reference"], sft(IDS).logits)
    base = load_file(inputs.policy / "model.safetensors")
    frozen = {name: x for name, x in models.policy.module.lm.named_parameters() if "lora_" not in name}
    assert base.keys() == {name.replace("base_layer.", "") for name in frozen}
    assert all(torch.equal(x, base[name.replace("base_layer.", "")]) for name, x in frozen.items())


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_layers_that_are_computed_again_use_the_adapters_of_their_forward(
    inputs, adapters, tmp_path, monkeypatch, zero_stage
):
    changes = {"zero_stage": zero_stage, "train_steps": 4}
    plain, _ = ppo_run(inputs, adapters, tmp_path / "plain", monkeypatch, **changes)
    again, models = ppo_run(inputs, adapters, tmp_path / "again", monkeypatch, gradient_checkpoint=True, **changes)
    assert models.policy.module.lm.is_gradient_checkpointing
    for row, other in zip(plain, again, strict=True):
        for name in ("score_mean", "kl_ref", "value_loss", "policy_loss", "grad_norm_policy", "grad_norm_critic"):
            assert row.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=1e-5, abs=1e-6), (row["step"], name)


def test_dropout_of_adapters(inputs, tmp_path):
    """It acts in training, from the second step on (adapters give 0 before), and not in evaluations."""
    flags = {"save_per_step": 1, "train_steps": 2, **LORA}
    runs = {}
    for share in (0.0, 0.5):
        train_sft(fit_flags(inputs.policy, inputs.dialogues, tmp_path / str(share), lora_dropout=share, **flags))
        runs[share] = read_metrics(tmp_path / str(share))
    first, second = zip(runs[0.0], runs[0.5], strict=True)
    assert first[0]["loss"] == first[1]["loss"]
    assert second[0]["loss"] != second[1]["loss"]


@pytest.mark.slow
def test_whole_models_of_the_runs_give_the_same(inputs, adapters, tmp_path, monkeypatch):
    """final/ of both runs, which hold the adapters merged."""
    paths = {"policy_model_path": adapters / "sft" / "final", "critic_model_path": adapters / "reward" / "final"}
    merged, _ = ppo_run(inputs, adapters, tmp_path / "merged", monkeypatch, **paths)
    shared, _ = ppo_run(inputs, adapters, tmp_path / "shared", monkeypatch)
    assert merged[0]["score_mean"] == pytest.approx(shared[0]["score_mean"], rel=1e-4)
    assert merged[0]["value_loss"] == pytest.approx(shared[0]["value_loss"], rel=1e-3)


@pytest.mark.parametrize("export", ["adapter", "both", pytest.param("merged", marks=pytest.mark.slow)])
def test_exports(inputs, adapters, tmp_path, monkeypatch, export):
    ppo_run(inputs, adapters, tmp_path / "run", monkeypatch, export=export)
    held = {x.parent.name for x in (tmp_path / "run").glob("*/adapter_config.json")}
    assert held == {"adapter": {"best", "final"}, "both": {"best_adapter", "final_adapter"}, "merged": set()}[export]
    if export == "both":
        part = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "final_adapter")
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
        torch.testing.assert_close(whole(IDS).logits, part(IDS).logits)
        settings = json.loads((tmp_path / "run" / "final_adapter" / "adapter_config.json").read_text())
        assert settings["r"] == 8 and settings["base_model_name_or_path"] == str(inputs.policy)  # SFT's and PPO's


def test_a_checkpoint_holds_adapters_alone_and_a_resumed_run_is_the_same(inputs, adapters, tmp_path, monkeypatch):
    flags = {"train_steps": 4, "checkpoint_per_step": 2, "save_per_step": 2, "export": "both"}
    ppo_run(inputs, adapters, tmp_path / "run", monkeypatch, **flags)
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "run", stopped)
    for name in ("final", "final_adapter", "checkpoints/step_4"):
        shutil.rmtree(stopped / name)
    [file] = (stopped / "checkpoints" / "step_2").glob("policy-rank0.safetensors")
    names = {key.split("/")[1] for key in load_file(file) if key != "step"}
    assert names and all(".lora_" in name and ".policy." in name for name in names)
    ppo_run(inputs, adapters, stopped, monkeypatch, **flags)
    assert_same_run(stopped, tmp_path / "run")


def test_another_base_is_refused(inputs, adapters, tmp_path, monkeypatch, capsys):
    """The same path, other weights."""
    base, flags = tmp_path / "base", {"train_steps": 2, "checkpoint_per_step": 1}
    shutil.copytree(inputs.policy, base)
    train_sft(fit_flags(base, inputs.dialogues, tmp_path / "sft", export="adapter", **LORA))
    paths = {"policy_model_path": tmp_path / "sft" / "final"}
    ppo_run(inputs, adapters, tmp_path / "run", monkeypatch, **flags, **paths)
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.copy(inputs.other_policy / "model.safetensors", base)
    with pytest.raises(SystemExit):
        ppo_run(inputs, adapters, tmp_path / "run", monkeypatch, **flags, **paths)
    assert "model.safetensors has other content" in capsys.readouterr().err


def test_a_critic_trained_before_ppo(inputs, adapters, tmp_path, request):
    """Its adapter is on the base that the others share, and its values are those of the whole model."""
    flags = {"policy_model_path": inputs.policy, "critic_model_path": adapters / "reward" / "final_adapter", **LORA}
    flags |= {"reward_model_path": adapters / "reward" / "final_adapter"}
    train_critic(
        [*run_flags(inputs, tmp_path / "critic", critic_pretrain_steps=2, export="both", **flags), "--pretrain"]
    )
    flags["critic_model_path"] = tmp_path / "critic" / "final_adapter"
    config = parse_args(PPOConfig, run_flags(inputs, tmp_path / "run", **flags), PRESETS, AMOUNTS)
    request.getfixturevalue("single_process")
    models = load_models(config, load_tokenizer(str(inputs.policy)), str)
    whole = load_scalar_model(str(tmp_path / "critic" / "final"), torch.float32, torch.device("cpu"), say=str)
    assert models.critic.module.decoder is models.policy.module.decoder
    assert is_pretrained(models.critic) and not models.reward.members[0].model.model.value_pretrained
    with torch.no_grad():
        torch.testing.assert_close(models.critic.module(IDS, torch.ones_like(IDS)), whole(IDS, torch.ones_like(IDS)))


@pytest.mark.parametrize("run", ["sft", "reward"])
def test_an_adapter_is_merged_later(adapters, tmp_path, run, capsys):
    merge(["--adapter", str(adapters / run / "final_adapter"), "--output", str(tmp_path / "whole")])
    assert "largest rounding error of a weight 0" in capsys.readouterr().out  # float32
    first, second = (load_file(x / "model.safetensors") for x in (tmp_path / "whole", adapters / run / "final"))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_the_plan_counts_shared_weights_once(inputs, adapters, single_process):
    paths = {"policy_model_path": adapters / "sft" / "final_adapter"}
    paths |= {"critic_model_path": adapters / "reward" / "final_adapter"}
    config = parse_args(PPOConfig, run_flags(inputs, "run", lora_rank=4, critic_lora_rank=2, **paths), PRESETS, AMOUNTS)
    rows = plan(config, 1).rows
    models = load_models(config, load_tokenizer(str(inputs.policy)), str)
    policy, critic = models.policy, models.critic
    trained = sum(x.numel() for engine in (policy, critic) for x in engine.parameters)
    base = sum(x.nbytes for name, x in policy.module.named_parameters() if "lora_" not in name)
    assert rows["weights of the policy"][0] == base
    assert rows["weights of the critic"][0] == rows["weights of the reference"][0] == 0
    assert rows["adapters of policy and critic"][0] == 4 * trained
    assert rows["optimizer of policy and critic"][0] == 12 * trained


def same_function(folder, scalar=False):
    """Whether final/ and final_adapter/ of a run, one merged and one not, are the same function."""
    if scalar:
        load = lambda name: load_scalar_model(str(folder / name), torch.float32, torch.device("cpu"), say=str)  # noqa: E731
        first, second = (load(name)(IDS, torch.ones_like(IDS)) for name in ("final", "final_adapter"))
    else:
        first = AutoModelForCausalLM.from_pretrained(folder / "final")(IDS).logits
        second = AutoPeftModelForCausalLM.from_pretrained(folder / "final_adapter")(IDS).logits
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_adapters_trained_on_an_adapter(inputs, adapters, tmp_path, monkeypatch):
    """SFT, a reward model and PPO, whose critic is on another base: what they write has the first adapter in it."""
    sft = adapters / "sft" / "final_adapter"
    train_sft(fit_flags(sft, inputs.dialogues, tmp_path / "sft", export="both", train_steps=2, **LORA))
    same_function(tmp_path / "sft")
    pairs = write_json(tmp_path / "pairs.json", [{"prompt": "Why?", "chosen": "good", "rejected": "bad"}] * 12)
    train_reward(fit_flags(sft, pairs, tmp_path / "reward", export="both", train_steps=2, **LORA))
    same_function(tmp_path / "reward", scalar=True)
    settings = json.loads((tmp_path / "reward" / "final_adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 8 and settings["base_model_name_or_path"] == str(inputs.policy)
    ppo_run(inputs, adapters, tmp_path / "ppo", monkeypatch, critic_model_path=inputs.reward, export="both")
    same_function(tmp_path / "ppo")


def test_all_weights_are_trained_from_an_adapter(inputs, adapters, tmp_path):
    sft = adapters / "sft" / "final_adapter"
    train_sft(fit_flags(sft, inputs.dialogues, tmp_path / "sft", train_steps=2, lr=1e-3))
    before, after = (load_file(x / "final" / "model.safetensors") for x in (adapters / "sft", tmp_path / "sft"))
    assert all(not torch.equal(after[name], x) for name, x in before.items())


def test_two_bases(inputs, tmp_path, monkeypatch):
    """Whole models: policy and reference share one, critic and reward model another; the plan says so."""
    flags = run_flags(inputs, tmp_path / "run", **LORA)
    config = parse_args(PPOConfig, flags, PRESETS, AMOUNTS)
    built, build = [], ppo.build.load_models
    monkeypatch.setattr(ppo.build, "load_models", lambda *args: built.append(build(*args)) or built[-1])
    train_ppo([*flags, "--train_steps", "1"])
    [models] = built
    critic, reward = models.critic.module, models.reward.members[0].model.model
    assert critic.decoder is reward.decoder is not models.policy.module.decoder
    assert models.reference.model.decoder is models.policy.module.decoder
    rows = plan(config, 1).rows
    assert rows["weights of the critic"][0] > 0 == rows["weights of 1 reward model(s)"][0]


def test_other_settings_are_another_base(inputs, adapters, tmp_path, single_process):
    """The same weight file with another rotary base is another function."""
    other = tmp_path / "other"
    shutil.copytree(inputs.policy, other)
    settings = json.loads((other / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] *= 2
    (other / "config.json").write_text(json.dumps(settings))
    reward = adapters / "reward" / "final_adapter"
    paths = {"policy_model_path": inputs.policy, "critic_model_path": other, "reward_model_path": reward}
    config = parse_args(PPOConfig, run_flags(inputs, tmp_path / "run", **paths | LORA), PRESETS, AMOUNTS)
    models = load_models(config, load_tokenizer(str(inputs.policy), "moss_en"), str)
    assert models.critic.module.decoder is not models.policy.module.decoder
    assert models.reward.members[0].model.model.decoder is models.policy.module.decoder


def refused(command, flags, capsys):
    with pytest.raises(SystemExit) as end:
        command(flags)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in error
    return error


def test_mistakes_of_users(inputs, adapters, tmp_path, capsys):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").touch()
    sft = adapters / "sft" / "final_adapter"
    assert "is there already" in refused(merge, ["--adapter", str(sft), "--output", str(kept)], capsys)
    assert (kept / "precious").exists()
    assert "is a whole model" in refused(merge, ["--adapter", str(inputs.policy), "--output", "x"], capsys)
    for names, problem in {
        "q_proj v_porj": "v_porj: a layer of this name does not exist",
        "embed_tokens": "embed_tokens: a layer of this name is not linear",
    }.items():
        flags = fit_flags(inputs.policy, inputs.dialogues, tmp_path / "sft", **LORA)
        assert problem in refused(train_sft, [*flags, "--lora_target_modules", *names.split()], capsys)
    own = tmp_path / "own"
    shutil.copytree(sft, own)
    settings = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(own)}))
    flags = run_flags(inputs, tmp_path / "run", policy_model_path=own, tokenizer_name_or_path=inputs.policy)
    for more in ([], ["--plan"]):
        assert "belongs to itself" in refused(train_ppo, [*flags, *more], capsys)
    base, out = tmp_path / "out" / "final", tmp_path / "out"
    shutil.copytree(inputs.policy, base)
    (own / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    flags = run_flags(inputs, out, policy_model_path=own, tokenizer_name_or_path=inputs.policy)
    assert str(base) in refused(train_ppo, [*flags, "--overwrite"], capsys) and base.exists()
