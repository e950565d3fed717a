"""The model folders that a weight diff connects: opening, comparison, and the files beside the weights.

Recovered folders get the tokenizer's own ids, as published configs have none or others.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.errors import Say, UserError
from utils.files import first_names, write_json
from utils.hub import download_model, is_hub_id
from utils.models.config import read_config as read_model_config
from utils.models.weight_files import Stored, open_weights, stored_tensors, tensor_of
from utils.tokenizer import check_vocabulary, load_tokenizer, save_tokenizer
from utils.weight_diff.manifest import Manifest, TensorHasher, read_manifest
from utils.weight_diff.published import DTYPES

PATCH_ENDINGS = (".patch_index", ".patch_value")  # of the names of a patch's two tensors (utils/weight_diff/recover.py)
_REWARD_HEAD, _EMBEDDING, _LM_HEAD = "reward_head.weight", "model.embed_tokens.weight", "lm_head.weight"
_BUFFER = "rotary_emb.inv_freq"  # saved by transformers of 2023, computed by later ones
_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Side:
    """A folder of weights. tensors: its parameters, all of `dtype`, in the order of the files, without its patches."""

    flag: str
    folder: Path
    tensors: dict[str, Stored]
    patches: dict[str, Stored]
    dtype: str
    manifest: Manifest | None

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor or patch, flat and memory-mapped."""
        file = (self.tensors.get(name) or self.patches[name]).file
        with open_weights(file, self.flag) as tensors:  # reopened, so that memory of earlier tensors is released
            return tensor_of(tensors, name).reshape(-1)

    def stream(
        self, names: list[str], hasher: TensorHasher | None = None, dtype: str | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the named tensors in `dtype` (default: their own), hashed if there is a hasher, read ahead."""

        def read(name: str) -> tuple[str, torch.Tensor]:
            tensor = self.read(name).to(getattr(torch, dtype or self.dtype))
            return hasher((name, tensor)) if hasher else (name, tensor)

        return ahead(read, names)

    def nbytes(self, dtype: str) -> int:
        """Returns the bytes of the parameters in `dtype`."""
        return sum(math.prod(stored.shape) for stored in self.tensors.values()) * getattr(torch, dtype).itemsize


def ahead(function: Callable, items: Iterable) -> Iterator:
    """Yields function(item) for every item; a thread computes the next result while the caller uses this one."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in items:
            result, pending = pending, pool.submit(function, item)
            if result:
                yield result.result()
        if pending:
            yield pending.result()


def is_difference(name: str) -> bool:
    """Whether a diff holds a tensor as a difference; it holds all others whole."""
    return "layers" in name


def open_side(path: str, flag: str) -> Side:
    """Opens the local folder or hub id `path`. Raises UserError, which names `flag`, if anything is wrong with it."""
    folder = download_model(path, flag) if is_hub_id(path) else Path(path)
    if not os.path.isdir(folder):
        raise UserError(f"{flag}: the folder {path} does not exist; use a model folder, or a hub id (owner/name)")
    stored = stored_tensors(folder, flag, contiguous=True)
    patches = {name: place for name, place in stored.items() if name.endswith(PATCH_ENDINGS)}
    tensors = {name: place for name, place in stored.items() if name not in patches and not name.endswith(_BUFFER)}
    if _EMBEDDING not in tensors:
        raise UserError(f"{flag}: no {_EMBEDDING} in {folder}; use a LLaMA model in Hugging Face layout")
    return Side(flag, folder, tensors, patches, _only_dtype(tensors, flag), read_manifest(folder, flag))


def _only_dtype(tensors: dict[str, Stored], flag: str) -> str:
    examples: dict[str, str] = {}
    for name, place in tensors.items():
        examples.setdefault(place.dtype, name)
    described = ", ".join(f"{dtype} ({name})" for dtype, name in examples.items())
    if len(examples) != 1:
        raise UserError(f"{flag} mixes dtypes: {described}; use weights that are all of one dtype")
    (dtype,) = examples
    if dtype not in DTYPES:
        raise UserError(f"{flag} holds {described}; use weights in one of {', '.join(DTYPES)}")
    return dtype


def check_pair(raw: Side, other: Side, model_type: str) -> None:
    """Raises UserError unless `other` has all tensors of the base `raw`, and its differences have the same shapes.

    other: a diff, or a model to make a diff of, with a reward head exactly if model_type is `reward`.
    """
    differences = [name for name in other.tensors if is_difference(name)]
    for source, side, names in ((raw, other, raw.tensors), (other, raw, differences)):
        if missing := [name for name in names if name not in side.tensors]:
            lack = f"lacks {len(missing)} tensors that {source.flag} has: {first_names(missing)}"
            raise UserError(f"{side.flag} {lack}; use folders of models of one architecture")
    for name in differences:
        shapes = [list(side.tensors[name].shape) for side in (raw, other)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{name} has shape {shapes[0]} in {raw.flag} and {shapes[1]} in {other.flag}; use one size")
    if (_REWARD_HEAD in other.tensors) != (model_type == "reward"):
        wrong = f"{other.flag} {'lacks' if model_type == 'reward' else 'holds'} {_REWARD_HEAD}"
        raise UserError(f"--model_type {model_type}, but {wrong}; pass the type of the model")


def read_config(sides: list[Side]) -> dict:
    """Returns the config of the first side that has one. Raises UserError if none has one, or it is not a LLaMA's."""
    side = next((side for side in sides if (side.folder / "config.json").is_file()), None)
    if side is None:
        raise UserError(f"no config.json in {' or '.join(side.flag for side in sides)}; copy it there")
    config = read_model_config(side.folder, side.flag)
    hidden, heads, layers = (config.get(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if config.get("model_type") != "llama" or not all(isinstance(size, int) for size in (hidden, heads, layers)):
        raise UserError(f"{side.flag}: {side.folder / 'config.json'} is not of a LLaMA model; copy the right one there")
    rows = side.tensors[_EMBEDDING].shape
    if hidden != rows[-1] or not 1 <= heads <= hidden or layers > len(side.tensors):
        wrong = f"hidden_size {hidden}, num_attention_heads {heads} or num_hidden_layers {layers}"
        raise UserError(f"{side.flag}: the weights in {side.folder} are not of {wrong}, as config.json says; copy both")
    return config


def write_model_files(folder: Path, config: dict, sides: list[Side], dtype: str, template: str, say: Say) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files into `folder`.

    sides: folders to take a tokenizer from, in this order; the recovered model gets the first one's embedding.
    """
    weights, ids = sides[0], dict(_LLAMA_IDS)
    rows = weights.tensors[_EMBEDDING].shape[0]
    side = next((side for side in sides if any((side.folder / name).is_file() for name in _TOKENIZER_FILES[:2])), None)
    if side is None:
        flags = " or ".join(side.flag for side in sides)
        say(f"no tokenizer in {flags}: the config gets LLaMA's own special ids; copy its tokenizer.model there")
    else:
        tokenizer = load_tokenizer(str(side.folder), template, flag=side.flag)
        check_vocabulary(tokenizer, rows, f"the model of {weights.flag}", side.flag)
        save_tokenizer(tokenizer, folder)
        ids = {name: getattr(tokenizer, name) for name in ids}
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "auto_map", "dtype")}
    changes = {
        "architectures": ["LlamaForCausalLM"],  # also of a reward model, which has lm_head and one tensor more
        "vocab_size": rows,
        "tie_word_embeddings": _LM_HEAD not in weights.tensors,
        "torch_dtype": dtype,
        **ids,
    }
    write_json(str(folder / "config.json"), kept | changes)
    write_json(str(folder / "generation_config.json"), ids)


def copy_model_files(source: Path, folder: Path) -> None:
    """Copies config and tokenizer files unchanged."""
    for name in ("config.json", "generation_config.json", *_TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
