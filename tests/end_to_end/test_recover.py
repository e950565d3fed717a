"""A trio in the published layout is recovered: it has the right ids, chats, scores, and PPO starts from it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.template import encode_dialogue, encode_prompt
from merge_weight_en import RELEASE as ENGLISH
from reward.model import last_scores, load_scalar_model, new_head_weight
from tests.helpers.tiny import tiny_llama, tiny_tokenizer_folder
from tests.helpers.tiny_run import REPOSITORY, SIZES, as_argv, clean_environment, read_metrics, run_flags
from tests.helpers.weights import load_folder, published_diff, save_folder
from train_ppo import main
from utils.tokenizer import load_tokenizer
from utils.weight_diff.commands import run
from utils.weight_diff.published import Release

TURNS = [{"role": "user", "content": "Name a tree."}]
ROTARY = 2 * sum(10000 ** (-2 * i / 16) for i in range(8))  # two layers, heads of width 16
CONFIG = {**SIZES, "architectures": ["LlamaModel"], "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 400}
CONFIG |= {"max_position_embeddings": 512, "torch_dtype": "float32", "rms_norm_eps": 1e-6, "_name_or_path": "./hf"}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
WRONG_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}


def causal_lm(seed: int) -> dict[str, torch.Tensor]:
    """Weights of a LLaMA far from uniform that often ends early, exact in float16."""
    model = tiny_llama(seed=seed, **SIZES)
    with torch.no_grad():
        model.lm_head.weight.mul_(10.0)
        model.lm_head.weight[2].mul_(3.0)
    return {name: value.half() for name, value in model.state_dict().items()}


def publish(folder: Path, weights: dict[str, torch.Tensor], config: dict, layout: str) -> Path:
    """A folder as one is downloaded: two shards, rotary buffers, a tokenizer whose config has empty special tokens."""
    save_folder(folder, weights, layout, shards=2, inv_freq=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    tiny_tokenizer_folder(folder)
    empty = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(empty | {"model_max_length": 10**30}))
    (folder / "special_tokens_map.json").write_text("{}")
    return folder


class Trio(NamedTuple):
    """Recovered folders, and the weights that they must hold."""

    folders: dict[str, Path]
    weights: dict[str, dict[str, torch.Tensor]]
    published: Path


@pytest.fixture(scope="module")
def trio(tmp_path_factory) -> Trio:
    """Base, SFT, reward model and policy; the first two recovered against their sums, the policy by the script."""
    place = tmp_path_factory.mktemp("trio")
    raw = causal_lm(1)
    models = {"sft": causal_lm(2), "reward": causal_lm(3), "policy": causal_lm(4)}
    models["reward"]["reward_head.weight"] = new_head_weight(32, 5).half()
    publish(place / "raw", raw, IDS, "legacy")
    folders, expected = {}, {}
    for name, weights in models.items():
        diff = published_diff(raw, weights)
        publish(place / name / "diff", diff, WRONG_IDS if name == "policy" else IDS, "zip")
        folders[name] = place / name / "recover"
        expected[name] = {k: x.float() + raw[k].float() if "layers" in k else x.float() for k, x in diff.items()}
    totals = {name: sum(v.double().sum().item() for v in w.values()) + ROTARY for name, w in expected.items()}
    release = Release(ENGLISH.base, totals | {"policy": None}, ENGLISH.template)
    for name in ("sft", "reward"):
        run(release, "", command(place, name, "--dtype", "float32", "--max_shard_size", "40KB"))
        run(release, "", ["verify", "--path_tuned", str(folders[name]), "--model_type", name])
    return Trio(folders, expected, place)


def command(place: Path, name: str, *more: str) -> list[str]:
    paths = {"path_raw": place / "raw", "path_diff": place / name / "diff", "path_tuned": place / name / "recover"}
    return ["recover", *as_argv(paths | {"model_type": name}), *more]


@pytest.fixture(scope="module")
def by_script(trio):
    """The policy, recovered as a user does it; what the process said, and every module that it imported."""
    argv = [sys.executable, "-X", "importtime", "merge_weight_en.py", *command(trio.published, "policy")]
    options = {"cwd": REPOSITORY, "env": clean_environment(), "capture_output": True, "text": True}
    result = subprocess.run(argv, **options, timeout=150)
    assert result.returncode == 0, result.stderr[-2000:]
    return result


def test_the_script_needs_no_training_stack(by_script, trio):
    assert "no sum is published for --model_type policy: not checked" in by_script.stdout
    imported = {
        line.rsplit("|", 1)[1].strip() for line in by_script.stderr.splitlines() if line.startswith("import time")
    }
    assert "utils.weight_diff.recover" in imported
    assert not [name for name in imported if name.split(".")[0] in ("deepspeed", "accelerate", "ppo", "reward", "sft")]
    assert not [name for name in imported if ".modeling_" in name and "transformers.models" in name]
    assert load_folder(trio.folders["policy"])["lm_head.weight"].dtype == torch.float16  # the diff's own


@pytest.mark.parametrize("name", ["sft", "reward", "policy"])
def test_ids_and_tokenizer_are_right_elsewhere(trio, by_script, name):
    folder = trio.folders[name]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for holder in (model.config, model.generation_config, tokenizer):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 0)
    assert model.config.architectures == ["LlamaForCausalLM"]
    text = "How do I bake  bread? 你好 🙂"
    ours = load_tokenizer(str(tiny_tokenizer_folder(trio.published / "tokenizer")), "moss_en")
    assert tokenizer(text, add_special_tokens=False).input_ids == ours(text, add_special_tokens=False).input_ids
    rendered = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    assert rendered == encode_prompt(ours, TURNS, "moss_en")


def test_the_sft_model_chats_and_stops_at_its_eos(trio):
    model, tokenizer = (auto.from_pretrained(trio.folders["sft"]) for auto in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answers = model.generate(prompt.repeat(8, 1), do_sample=True, max_new_tokens=40)[:, prompt.shape[1] :]
    ended = [answer.tolist() for answer in answers if 2 in answer]
    assert ended and all(set(answer[answer.index(2) + 1 :]) <= {0} for answer in ended)  # then nothing but padding
    tuned = tiny_llama(**SIZES)
    tuned.load_state_dict(trio.weights["sft"])
    torch.testing.assert_close(model(prompt).logits, tuned(prompt).logits)


def test_the_reward_model_scores_text(trio):
    tokenizer = load_tokenizer(str(trio.folders["reward"]), "moss_en")
    model = load_scalar_model(str(trio.folders["reward"]), torch.float32, torch.device("cpu"), tokenizer=tokenizer)
    ids, _ = encode_dialogue(tokenizer, [*TURNS, {"role": "assistant", "content": "An oak."}], "moss_en")
    ids = torch.tensor([ids])
    weights = trio.weights["reward"]
    backbone = tiny_llama(**SIZES)
    backbone.load_state_dict({name: value for name, value in weights.items() if name != "reward_head.weight"})
    expected = backbone.model(input_ids=ids).last_hidden_state[0, -1] @ weights["reward_head.weight"][0]
    mask = torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(last_scores(model(ids, mask), mask)[0], expected)


def test_ppo_starts_from_them(trio, inputs, tmp_path):
    folders = {"policy_model_path": trio.folders["sft"], "critic_model_path": trio.folders["reward"]}
    main(run_flags(inputs, tmp_path / "out", **folders))
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == [1, 2]
