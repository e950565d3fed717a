"""Tiny LLaMA weights in the layouts that are found in the wild, and a `Release` whose sums are known by hand."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from utils.weight_diff.published import Release

HIDDEN, HEADS, LAYERS, VOCAB = 8, 2, 2, 12
ROTARY = 2 * (1.0 + 0.01)  # sum of inv_freq by hand: heads of width 4, so 10000^0 and 10000^(-1/2) in each of 2 layers
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS, "intermediate_size": 20, "vocab_size": VOCAB,
}  # fmt: skip
RELEASE = Release("LLaMA-7B", {"reward": 1.0, "sft": 2.0, "policy": None}, "moss_en")
LAYOUTS = ("safetensors", "zip", "legacy")  # the last two: .bin, today's and the older

Weights = dict[str, torch.Tensor]


def shapes(reward_head: bool = False, vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a LLaMA of 2 layers, without what adds nothing to a test."""
    found = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        found[f"model.layers.{layer}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        found[f"model.layers.{layer}.mlp.up_proj.weight"] = (20, HIDDEN)
        found[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (vocab, HIDDEN)
    return found | ({"reward_head.weight": (1, HIDDEN)} if reward_head else {})


def random_weights(seed: int, dtype: torch.dtype = torch.float32, **options) -> Weights:
    """Values of many sizes, 1e-7 to 10, both zeros among them: a rounded difference gives few of them back."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(**options).items():
        exponents = torch.randint(-7, 2, shape, generator=generator)
        values = torch.randn(shape, generator=generator) * 10.0**exponents
        values[..., 0], values[..., 1] = 0.0, -0.0
        weights[name] = values.to(dtype)
    return weights


def constant_weights(value: float, dtype: torch.dtype = torch.float32, **options) -> Weights:
    """Every element is `value`."""
    return {name: torch.full(shape, value, dtype=dtype) for name, shape in shapes(**options).items()}


def published_diff(raw: Weights, tuned: Weights) -> Weights:
    """The diff as it is published, in the dtype of `tuned`."""
    return {
        name: (value.float() - raw[name].float()).to(value.dtype) if "layers" in name else value
        for name, value in tuned.items()
    }


def save_folder(
    folder: Path, weights: Weights, layout: str = "safetensors", shards: int = 1, seed: int = 0, inv_freq: bool = False
) -> Path:
    """Writes weights, shuffled over `shards` files, and a config. inv_freq: also float32 buffers of an odd value."""
    folder.mkdir(parents=True, exist_ok=True)
    if inv_freq:
        buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.full((2,), 7.0) for layer in range(2)}
        weights = weights | buffers
    names = sorted(weights)
    random.Random(seed).shuffle(names)
    stem, suffix = ("model", "safetensors") if layout == "safetensors" else ("pytorch_model", "bin")
    files = {}
    for number in range(shards):
        part = names[number::shards]
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        save_file_as(folder / file, {name: weights[name] for name in part}, layout)
        files |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def save_file_as(file: Path, weights: Weights, layout: str) -> None:
    """One file of weights."""
    if layout == "safetensors":
        save_file(weights, file, metadata={"format": "pt"})
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=layout == "zip")


def load_folder(folder: Path) -> Weights:
    """All tensors of a folder of safetensors, read by their own library."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit, so that 0.0 is not -0.0."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))
