"""What a tiny PPO run needs, and what it leaves: folders of inputs, a command line, the numbers it wrote."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reward.model import load_scalar_model, save_scalar_model
from tests.helpers.tiny import tiny_llama, tiny_llama_folder, tiny_tokenizer_folder
from utils.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
MEASURED = ("seconds_", "samples_per_second", "tokens_per_second", "memory_")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}

PROMPTS = [
    ["Why is the sky blue?"],
    ["How do I bake bread?"],
    ["What can I cook with two eggs and a little rice in twenty minutes?"],
    ["Hi", "Hello, what can I do for you?", "Tell me a short story about a fox."],
    ["Which is larger, the sun or the moon?"],
    ["Name a tree."],
    ["I cannot sleep. Do you have any advice for me that does not cost money?"],
    ["What is a comet?"],
    ["Write one line about rain."],
    ["Is tea good for a cold?"],
    ["Count to five."],
]
HELD_OUT = [["What is a good name for a cat?"], ["Help"], ["How far away is the moon, and how do we know that?"]]

# Scores: how many answers' letters are vowels. The other two are for the runs that have to stop.
REWARD_FILE = """
def vowels(prompts, answers):
    return [sum(letter in "aeiou" for letter in answer) / (1 + len(answer)) for answer in answers]

def always_nan(prompts, answers):
    return [float("nan") for _ in answers]

def nan_for_rain(prompts, answers):
    return [float("nan") if turns[-1]["content"] == "Write one line about rain." else 0.5 for turns in prompts]

def too_few(prompts, answers):
    return [1.0]

def fails(prompts, answers):
    return {}["no such word"]

def words(prompts, answers):
    return ["good" for _ in answers]

def in_parts(prompts, answers):
    fails = [len(answer) % 3 == 2 for answer in answers]
    return {"vowels": [None if x else y for x, y in zip(fails, vowels(prompts, answers))], "one": [1.0] * len(answers)}

async def short(prompts, answers):
    return [-len(answer) for answer in answers]

constant = 3
"""


@dataclass(frozen=True)
class Inputs:
    """Paths of one set of inputs: models of float32, data, and a file of reward functions."""

    policy: Path
    other_policy: Path
    reward: Path
    prompts: Path
    dialogues: Path
    reward_file: Path


def build_inputs(folder: Path, **changes) -> Inputs:
    """Two policies (hidden 32, 2 layers; changes: of these), a reward model, 11 prompts and 3 held out, dialogues."""
    policy, other = (policy_folder(folder / x, seed, **changes) for seed, x in enumerate(("policy", "other_policy"), 1))
    base = tiny_llama_folder(folder / "reward_base", seed=3, **SIZES)
    cpu = torch.device("cpu")
    save_scalar_model(load_scalar_model(str(base), torch.float32, cpu, say=lambda _: None), str(folder / "reward"))
    prompts = folder / "prompts"
    prompts.mkdir()
    write_json(prompts / "train.json", PROMPTS)
    write_json(prompts / "valid.json", HELD_OUT)
    dialogues = folder / "dialogues.json"
    write_json(dialogues, [[prompt[0], f"That is a fine question, number {i}."] for i, prompt in enumerate(PROMPTS)])
    reward_file = folder / "reward_file.py"
    reward_file.write_text(REWARD_FILE)
    return Inputs(policy, other, folder / "reward", prompts, dialogues, reward_file)


def tiny_reward_model(folder: Path, vocab: int, seed: int = 9) -> Path:
    """A reward model with a tokenizer of `vocab` pieces beside it."""
    base = folder.with_name(f"{folder.name}_base")
    tiny_llama_folder(base, vocab, seed, tokenizer=False, **SIZES)
    tiny_tokenizer_folder(base, vocab)
    model = load_scalar_model(str(base), torch.float32, torch.device("cpu"), say=str, seed=vocab)
    save_scalar_model(model, str(folder), tokenizer=load_tokenizer(str(base), "moss_en"))
    return folder


def policy_folder(folder: Path, seed: int, **changes) -> Path:
    """A random policy that is far from uniform and often ends early, so that responses are of many lengths."""
    model = tiny_llama(seed=seed, **SIZES | changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(10.0)
        model.lm_head.weight[model.config.eos_token_id].mul_(3.0)
    model.save_pretrained(folder)
    return tiny_tokenizer_folder(folder)


def write_json(path: Path, content) -> Path:
    """The path, for calls within calls."""
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def run_flags(inputs: Inputs, out: Path, **changes) -> list[str]:
    """A command line of train_ppo.py: two steps in float32. changes: values by flag, as for `as_argv`."""
    flags = {
        "policy_model_path": inputs.policy, "critic_model_path": inputs.reward, "data_path": inputs.prompts,
        "model_save_path": out, "dtype": "fp32", "train_steps": 2, "warmup_steps": 1, "lr": 1e-4, "critic_lr": 1e-3,
        "critic_pretrain_steps": 0,
        "num_rollouts": 8, "batch_size": 4, "rollout_batch_size": 3, "micro_batch_tokens": 200, "maxlen_prompt": 80,
        "maxlen_res": 12, "save_per_step": 1, "num_eval_prompts": 3, "seed": 7,
    } | changes  # fmt: skip
    return as_argv(flags)


def fit_flags(base: Path, data: Path, out: Path, **changes) -> list[str]:
    """A command line of sft.train or reward.train: three steps in float32."""
    flags = {
        "hf_model_name_or_path": base, "data_path": data, "model_save_path": out, "dtype": "fp32", "train_steps": 3,
        "warmup_steps": 1, "batch_size": 4, "context_truncate": 128, "lr": 1e-3,
    }  # fmt: skip
    return as_argv(flags | changes)


def remembered(inputs: Inputs, make_folder: Callable[[str], Path], **always) -> Callable[..., list[dict]]:
    """A function that runs train_ppo.py with changed flags and gives the metrics of its steps; the same flags run once.

    make_folder: as `tmp_path_factory.mktemp`. always: flags of all runs.
    """
    known = {}

    def run(**changes) -> list[dict]:
        key = repr(sorted(changes.items()))
        if key not in known:
            out = make_folder("run") / "new"
            importlib.import_module("train_ppo").main(run_flags(inputs, out, **always, **changes))
            known[key] = read_metrics(out)
        return known[key]

    return run


def as_argv(flags: dict) -> list[str]:
    """Flags as words: a list is several values, None leaves a flag out, True is bare."""
    argv = []
    for name, value in flags.items():
        if value is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            argv += [f"--{name}", *map(str, values)]
    return argv


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_metrics(out: Path) -> list[dict]:
    """What a run wrote, a dict a step, without times and memory, which no two runs share."""
    rows = read_lines(out / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(MEASURED)} for row in rows]


def clean_environment() -> dict[str, str]:
    """For a subprocess: this process's environment without the process group that runs in this one have joined."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "CROSS_RANK")
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    kept = {key: value for key, value in os.environ.items() if key not in group}
    path = os.pathsep.join([str(REPOSITORY), kept.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return kept | settings | {"PYTHONPATH": path}


def run_module(name: str, *words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -m name words` from the repository's folder, on the CPU."""
    command = [sys.executable, "-m", name, *map(str, words)]
    settings = clean_environment() | {"DS_ACCELERATOR": "cpu"} | environment
    return subprocess.run(command, cwd=REPOSITORY, env=settings, capture_output=True, text=True, timeout=timeout)


def refusal(main, argv: list[str], capfd) -> str:
    """The line "error: …" of a command that has to end with exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    lines = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2, lines
    (line,) = (line for line in lines if line.startswith("error: "))
    return line


def final_weights(run: Path, name: str = "final") -> dict[str, torch.Tensor]:
    """Tensors of the model that a run has exported."""
    return load_file(run / name / "model.safetensors")


def assert_close(out: Path, expected: Path, rel: float = 1e-5, abs: float = 5e-6) -> None:
    """Metrics of two runs are equal but for roundings."""
    rows, others = read_metrics(out), read_metrics(expected)
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=rel, abs=abs)


def assert_same_run(out: Path, expected: Path, *folders: str) -> None:
    """Metrics, samples and exported weights (of `final`, and of other folders) of two runs are equal bit for bit."""
    assert read_metrics(out) == read_metrics(expected)
    if (expected / "samples.jsonl").exists():
        assert read_lines(out / "samples.jsonl") == read_lines(expected / "samples.jsonl")
    for folder in ("final", *folders):
        weights, others = final_weights(out, folder), final_weights(expected, folder)
        assert weights.keys() == others.keys()
        assert [name for name, tensor in weights.items() if not torch.equal(tensor, others[name])] == []
