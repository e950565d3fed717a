"""The folders that a weight diff connects: opened without reading weights, compared; and what is beside the weights.

Published folders have empty special tokens in their tokenizer config, and a policy's config has ids of another
tokenizer. What is written here has the tokenizer's own ids, so that a model stops generating at its end token.
"""

import json
import math
import os
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from utils import tokenizer as tokenizers
from utils.errors import UserError
from utils.files import first_names, read_json
from utils.hub import download_model, is_hub_id
from utils.models.weight_files import open_weights, tensor_files, tensor_of
from utils.weight_diff.manifest import Manifest, TensorHasher, read_manifest
from utils.weight_diff.published import DTYPES

PATCH_ENDINGS = (".patch_index", ".patch_value")  # of the names of a patch's two tensors (utils/weight_diff/recover.py)
_REWARD_HEAD, _EMBEDDING, _LM_HEAD = "reward_head.weight", "model.embed_tokens.weight", "lm_head.weight"
_BUFFER = "rotary_emb.inv_freq"  # models of 2023 saved it; today's compute it
_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)


T, R = TypeVar("T"), TypeVar("R")


class Stored(NamedTuple):
    """A tensor of a file. dtype: torch's name. held: its values, where a file can only be read whole (torch < 1.6)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    held: torch.Tensor | None


@dataclass(frozen=True)
class Side:
    """A folder of weights. tensors: its parameters, all of `dtype`, in the order of the files; patches: apart."""

    flag: str
    folder: Path
    tensors: dict[str, Stored]
    patches: dict[str, Stored]
    dtype: str
    manifest: Manifest | None

    def read(self, name: str) -> torch.Tensor:
        """A tensor or patch, flat. Its pages come into memory when its values are used, and go with it."""
        stored = self.tensors.get(name) or self.patches[name]
        if stored.held is not None:
            return stored.held.reshape(-1)
        with open_weights(stored.file, self.flag) as tensors:  # anew, so that what was read of it before is unmapped
            return tensor_of(tensors, name).reshape(-1)

    def stream(
        self, names: list[str], hasher: TensorHasher | None = None, dtype: str | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the named tensors in `dtype` (default: their own), hashed with a hasher; a thread reads the next."""

        def read(name: str) -> tuple[str, torch.Tensor]:
            tensor = self.read(name).to(getattr(torch, dtype or self.dtype))
            return hasher((name, tensor)) if hasher else (name, tensor)

        return ahead(read, names)

    def nbytes(self, dtype: str) -> int:
        """Bytes of the parameters in `dtype`."""
        return sum(math.prod(stored.shape) for stored in self.tensors.values()) * getattr(torch, dtype).itemsize


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yields function(item) for every item; a thread works on the next item while the caller uses this result.

    It pays where `function` leaves Python's lock alone, as reading, hashing and torch do.
    """
    waiting = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        for last in waiting:
            yield last.result()


def is_difference(name: str) -> bool:
    """Whether a diff holds this tensor as a difference. All others it holds whole."""
    return "layers" in name


def open_side(path: str, flag: str) -> Side:
    """Opens the local folder or hub id `path`. Raises UserError, naming `flag`, when anything is wrong with it."""
    folder = download_model(path, flag) if is_hub_id(path) else Path(path)
    if not os.path.isdir(folder):
        raise UserError(f"{flag}: the folder {path} does not exist; give a model folder, or a hub id (owner/name)")
    stored = _stored(folder, flag)
    patches = {name: place for name, place in stored.items() if name.endswith(PATCH_ENDINGS)}
    tensors = {name: place for name, place in stored.items() if name not in patches and not name.endswith(_BUFFER)}
    if _EMBEDDING not in tensors:
        raise UserError(f"{flag}: no {_EMBEDDING} in {folder}; give a LLaMA model in Hugging Face layout")
    return Side(flag, folder, tensors, patches, _only_dtype(tensors, flag), read_manifest(folder, flag))


def _stored(folder: Path, flag: str) -> dict[str, Stored]:
    """All tensors of a model folder, file after file."""
    file_of = tensor_files(folder, flag)
    files = sorted(set(file_of.values()))
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{flag}: {folder} lacks {first_names(missing)}, which its index names; copy the folder again")
    found = {file: _outline(file, flag) for file in files}
    for file, tensors in found.items():
        if absent := [name for name in file_of if file_of[name] == file and name not in tensors]:
            raise UserError(
                f"{flag}: the index names tensors that are not in {file}: {first_names(absent)}; index and shards are "
                "not of one model, copy the folder again"
            )
    return {
        name: place for tensors in found.values() for name, place in tensors.items() if file_of.get(name) == place.file
    }


def _outline(file: Path, flag: str) -> dict[str, Stored]:
    """What one file holds, in the order of the file."""
    found = {}
    mapped = file.suffix == ".safetensors" or zipfile.is_zipfile(file)
    with open_weights(file, flag) as tensors:
        for name in tensors if isinstance(tensors, dict) else tensors.offset_keys():
            tensor = tensor_of(tensors, name)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous; save it again as safetensors")
            found[name] = Stored(
                file, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), None if mapped else tensor
            )
    return found


def _only_dtype(tensors: dict[str, Stored], flag: str) -> str:
    examples: dict[str, str] = {}
    for name, place in tensors.items():
        examples.setdefault(place.dtype, name)
    described = ", ".join(f"{dtype} ({name})" for dtype, name in examples.items())
    if len(examples) != 1:
        raise UserError(f"{flag} mixes dtypes: {described}; give weights that are all of one dtype")
    (dtype,) = examples
    if dtype not in DTYPES:
        raise UserError(f"{flag} holds {described}: give weights in one of {', '.join(DTYPES)}")
    return dtype


def check_pair(raw: Side, other: Side, model_type: str) -> None:
    """Raises UserError unless `other` has all tensors of `raw`, differences in the same shapes, only whole ones more.

    raw: the base. other: a diff against it, or the model that one is to be made of; of model_type `reward` if, and only
    if, it has a reward head.
    """
    _check_names(raw, other, list(raw.tensors))
    _check_names(other, raw, [name for name in other.tensors if is_difference(name)])
    for name, place in other.tensors.items():
        if is_difference(name) and place.shape != raw.tensors[name].shape:
            shapes = f"{list(raw.tensors[name].shape)} in {raw.flag} and {list(place.shape)} in {other.flag}"
            raise UserError(f"{name} has shape {shapes}; give folders of models of one size")
    if (_REWARD_HEAD in other.tensors) != (model_type == "reward"):
        wrong = f"{other.flag} {'lacks' if model_type == 'reward' else 'holds'} {_REWARD_HEAD}"
        raise UserError(f"--model_type {model_type}, but {wrong}: give the model type that it is of")


def _check_names(source: Side, other: Side, names: list[str]) -> None:
    if missing := [name for name in names if name not in other.tensors]:
        raise UserError(
            f"{other.flag} lacks {len(missing)} tensors that {source.flag} has: {first_names(missing)}; give folders "
            "of models of one architecture"
        )


def read_config(sides: list[Side]) -> dict:
    """The config of the first side that has one. Raises UserError when none has, or when it is not a LLaMA's."""
    side = next((side for side in sides if (side.folder / "config.json").is_file()), None)
    if side is None:
        raise UserError(f"no config.json in {' or '.join(side.flag for side in sides)}; copy it there")
    config = read_json(side.folder / "config.json", side.flag)
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    if config.get("model_type") != "llama" or not all(isinstance(config.get(name), int) for name in sizes):
        raise UserError(f"{side.flag}: {side.folder / 'config.json'} is not of a LLaMA model; copy the right one there")
    return config


def write_model_files(
    folder: Path, config: dict, sides: list[Side], dtype: str, template: str, say: Callable[[str], None]
) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files into `folder`.

    sides: where a tokenizer is looked for, in this order; the recovered model gets the first one's embedding. Raises
    UserError for a tokenizer that is damaged or larger than the embedding.
    """
    weights, ids = sides[0], dict(_LLAMA_IDS)
    rows = weights.tensors[_EMBEDDING].shape[0]
    side = next((side for side in sides if any((side.folder / name).is_file() for name in _TOKENIZER_FILES[:2])), None)
    if side is None:
        flags = " or ".join(side.flag for side in sides)
        say(f"no tokenizer in {flags}: LLaMA's own special ids go into the config; copy its tokenizer.model there")
    else:
        try:
            tokenizer = tokenizers.load_tokenizer(str(side.folder), template)
        except UserError as error:
            raise UserError(str(error).replace(tokenizers.FLAG, side.flag)) from error
        tokenizers.check_vocabulary(tokenizer, rows, f"the model of {weights.flag}")
        tokenizers.save_tokenizer(tokenizer, folder)
        ids = {name: getattr(tokenizer, name) for name in ids}
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "auto_map", "dtype")}
    changes = {
        "architectures": ["LlamaForCausalLM"],  # a reward model too: its head is a tensor more, lm_head is there
        "vocab_size": rows,
        "tie_word_embeddings": _LM_HEAD not in weights.tensors,
        "torch_dtype": dtype,
        **ids,
    }
    for name, content in (("config.json", kept | changes), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_model_files(source: Path, folder: Path) -> None:
    """Copies config and tokenizer files as they are."""
    for name in ("config.json", "generation_config.json", *_TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
