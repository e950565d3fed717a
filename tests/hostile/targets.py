"""What the fuzzer changes, and the functions of a start that read it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import ppo.report
import ppo.state
from data.choose_template import prepare_tokenizer
from data.template import decode_answer, encode_dialogue
from sft.config import SFTConfig
from sft.model import AnswerModel
from tests.hostile import mutations
from utils.engine.engine import TrainEngine, init_distributed
from utils.flags.parser import parse_args
from utils.models.load import FLAG, load_causal_lm, window_at
from utils.report.page import page_of
from utils.report.read import read_run
from utils.run import restore
from utils.run.folder import cut_lines
from utils.run.supervised_loop import FitState
from utils.weight_diff.model_files import open_side, read_config

CPU = torch.device("cpu")
TURNS = [[{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello."}], [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}, {"role": "assistant",
    "content": "Two."},
    {"role": "user", "content": "Three?"}, {"role": "assistant", "content": "Four."}]]  # fmt: skip


def say(_: str) -> None:
    """Nothing is printed."""


@dataclass(frozen=True)
class Target:
    """A file of a folder, how to change it, and what reads the folder. share: of all mutations, relative to others."""

    source: str
    file: str
    mutate: Callable
    read: Callable[[Path], object]
    share: int = 10


def read_model(folder: Path) -> None:
    """As a trainer loads a language model: config, weights, a forward."""
    window_at(str(folder))
    load_causal_lm(str(folder), torch.float32, CPU, say=say)


def read_tokenizer(folder: Path) -> None:
    """As a trainer prepares a tokenizer, and encodes dialogues."""
    path = str(folder)
    flags = ["--hf_model_name_or_path", path, "--data_path", path, "--model_save_path", path]
    tokenizer, template = prepare_tokenizer(parse_args(SFTConfig, flags), path, [(FLAG, path)], say)
    for turns in TURNS[: 1 + (template != "chat")]:
        ids, _ = encode_dialogue(tokenizer, turns, template)
        decode_answer(tokenizer, ids)


def read_side(folder: Path) -> None:
    """As the merge commands read a folder."""
    side = open_side(str(folder), "--path_diff")
    read_config([side])
    for name in side.tensors:
        side.read(name).float().sum()


class Resume:
    """As a trainer resumes: finds the checkpoint and restores an engine from it."""

    def __init__(self, model: Path):
        init_distributed()
        flags = ["--hf_model_name_or_path", str(model), "--data_path", "x", "--model_save_path", "x", "--dtype", "fp32"]
        config = parse_args(SFTConfig, flags)
        self.engines = {
            "model": TrainEngine(AnswerModel(load_causal_lm(str(model), torch.float32, CPU, say=say)), config, "model")
        }

    def __call__(self, folder: Path) -> None:
        if found := restore.newest(str(folder / "checkpoints"), say, FitState):
            restore.restore(found, self.engines)


def read_state(folder: Path) -> None:
    """As PPO resumes, without its engines."""
    if found := restore.newest(str(folder / "checkpoints"), say, ppo.state.PPOState):
        ppo.state.RunState().load_state_dict(found.state)


def read_report(folder: Path) -> None:
    """As the report reads a run, and a resumed run its lines."""
    run = read_run(folder)
    ppo.report.judge(run)
    page_of([run])
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_lines(str(folder / name), 1)


STEP = "checkpoints/step_1"
TARGETS = [
    Target("policy", "config.json", mutations.mutate_json, read_model, 20),
    Target("chat", "generation_config.json", mutations.mutate_json, read_tokenizer, 5),
    Target("chat", "tokenizer.json", mutations.mutate_json, read_tokenizer, 20),
    Target("chat", "tokenizer_config.json", mutations.mutate_json, read_tokenizer, 15),
    Target("llama", "tokenizer_config.json", mutations.mutate_json, read_tokenizer, 8),
    Target("llama", "added_tokens.json", mutations.mutate_json, read_tokenizer, 4),
    Target("llama", "tokenizer.model", mutations.mutate_sentencepiece, read_tokenizer, 10),
    Target("chat", "chat_template.jinja", mutations.mutate_template, read_tokenizer, 25),
    Target("policy", "model.safetensors", mutations.mutate_safetensors, read_model, 10),
    Target("zip", "pytorch_model.bin", mutations.mutate_bin, read_model, 8),
    Target("legacy", "pytorch_model.bin", mutations.mutate_bin, read_model, 6),
    Target("sharded", "model.safetensors.index.json", mutations.mutate_json, read_model, 4),
    Target("diff", "model.safetensors", mutations.mutate_safetensors, read_side, 6),
    Target("diff", "weight_manifest.json", mutations.mutate_json, read_side, 4),
    Target("fit_run", f"{STEP}/state.json", mutations.mutate_json, Resume, 8),
    Target("fit_run", f"{STEP}/random-rank0.json", mutations.mutate_json, Resume, 6),
    Target("fit_run", f"{STEP}/manifest.json", mutations.mutate_json, Resume, 5),
    Target("fit_run", f"{STEP}/model-rank0.safetensors", mutations.mutate_safetensors, Resume, 15),
    Target("ppo_run", f"{STEP}/state.json", mutations.mutate_json, read_state, 12),
    Target("ppo_run", "metrics.jsonl", mutations.mutate_lines, read_report, 5),
    Target("ppo_run", "samples.jsonl", mutations.mutate_lines, read_report, 4),
]  # fmt: skip


def add_sources(materials: dict[str, Path]) -> None:
    """Folders that the corpus does not need: weights in other layouts, every file of a tokenizer."""
    policy = materials["policy"]
    state = load_file(policy / "model.safetensors")
    for name in ("zip", "legacy", "sharded", "llama"):
        materials[name] = shutil.copytree(policy, policy.with_name(name))
    for name in ("zip", "legacy"):
        (materials[name] / "model.safetensors").unlink()
        torch.save(state, materials[name] / "pytorch_model.bin", _use_new_zipfile_serialization=name == "zip")
    shard = "model-00001-of-00001.safetensors"
    (materials["sharded"] / "model.safetensors").rename(materials["sharded"] / shard)
    index = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(state, shard)}
    (materials["sharded"] / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None,
        "added_tokens_decoder": {
        str(i): {"content": token, "special": True, "lstrip": False} for i, token in enumerate(("<unk>", "<s>",
        "</s>"))}}  # fmt: skip
    (materials["llama"] / "tokenizer_config.json").write_text(json.dumps(settings))
    (materials["llama"] / "added_tokens.json").write_text(json.dumps({"<s>": 1, "</s>": 2}))
    manifest = {
        part: {"dtype": "float16", "sha256": dict.fromkeys(("model.norm.weight",), "0" * 64)}
        for part in ("tuned", "raw", "diff")
    }
    (materials["diff"] / "weight_manifest.json").write_text(json.dumps(manifest | {"total": 1.5}))
