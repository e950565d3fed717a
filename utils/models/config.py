"""Checks config.json and generation_config.json before transformers reads them, and a config against the weights.

transformers checks the types of an architecture's own keys. This file refuses values that transformers accepts but that
cannot be right, or would take hours or all memory. It goes by the names of keys, as each architecture has its own.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PretrainedConfig

from utils.files import read_json
from utils.models.weight_files import Stored
from utils.schema import Schema

# Settings of a model that change no number.
UNUSED = re.compile("_.*|.*_token_id|architectures|dtype|transformers_version|use_cache")
_LAYERS = (-100, 10_000)  # also places of layers, from the end
# Names of keys, and the least and the largest number that they can hold.
_RANGES = {
    r".*(layers?|blocks)": _LAYERS,
    r".*(heads?|experts|labels)": (0, 100_000),
    r".*(_size|_dim|_embd|positions|embeddings)|d_[a-z]+|.*_token_id": (-1, 2**31),
    r"rope_theta|factor": (1e-9, 1e18),
    r"(.*_)?eps(ilon)?": (0, 1),
}
_POSITIVE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip


_Id = Annotated[int, Field(ge=-1, lt=2**31)]
_Ids = _Id | list[_Id] | None


class _Settings(Schema):
    """Keys of both files. No number may be NaN or infinite, or out of the range of its name (_RANGES)."""

    bos_token_id: _Ids = None
    eos_token_id: _Ids = None
    pad_token_id: _Ids = None
    dtype: str | dict | None = None
    torch_dtype: str | dict | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_numbers(cls, content: Any) -> Any:
        for name, value in _values(content):
            _check_value(name, value)
        return content


class _Quantization(Schema):
    quant_method: str | None = None


class _Config(_Settings):
    """Keys of config.json."""

    architectures: list[str] | None = None
    auto_map: dict | None = None
    text_config: dict | None = None
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None
    quantization_config: _Quantization | None = None


def _values(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of all values in nested objects and lists; those in a list have the key of the list."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _values(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _values(value, name)
    else:
        yield name, content


def _check_value(name: str, value: Any) -> None:
    if name in ("dtype", "torch_dtype") and isinstance(value, str):
        known = isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
        if not known and value != "auto":
            raise ValueError(f"{name} {value!r} is not a dtype of torch")
    ranges = [bounds for pattern, bounds in _RANGES.items() if re.fullmatch(pattern, name)]
    if isinstance(value, str) and ranges and ranges != [_LAYERS]:  # some have a list of layers as text
        raise ValueError(f"{name} is {value!r}, not a number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and "limit" not in name)):
        raise ValueError(f"{name} is {value}, not a finite number")
    if isinstance(value, int) and abs(value) > 2**63 and not re.search("length|limit", name):
        raise ValueError(f"{name} is a number of more than 64 bits")
    for least, most in ranges:
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}, out of the range {least:g} to {most:g}")


def read_config(folder: Path, flag: str) -> dict:
    """Returns the content of a model's config.json. Raises UserError for values that no model has, there and in
    generation_config.json.
    """
    if os.path.lexists(folder / "generation_config.json"):
        read_json(folder / "generation_config.json", flag, _Settings)
    return read_json(folder / "config.json", flag, _Config)


def check_counts(config: PretrainedConfig, stored: dict[str, Stored]) -> None:
    """Raises ValueError for a config whose sizes are not positive, or that has more layers than the weights."""
    text = config.get_text_config()
    if not isinstance(text, PretrainedConfig):
        raise ValueError(f"text_config is of the type {type(text).__name__}")
    sizes = {name: vars(text).get(text.attribute_map.get(name, name)) for name in _POSITIVE}
    for name, value in sizes.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} is {value}")
    layers = sizes["num_hidden_layers"]
    if isinstance(layers, int) and layers > len(stored) + 64:
        raise ValueError(f"num_hidden_layers is {layers}, and the weights are {len(stored)} tensors")


def check_memory(model: nn.Module, stored: dict[str, Stored]) -> None:
    """Raises ValueError if a model on the meta device is much larger than the stored weights (a packed one holds up to
    8 values), or if a `.weight` is not floating point.
    """
    needed = sum(x.numel() for x in (*model.parameters(), *model.buffers()))
    held = sum(math.prod(place.shape) for place in stored.values())
    if needed > 16 * held + 10**8:
        raise ValueError(f"config.json describes {needed:.3g} parameters, and the weights hold {held:.3g}")
    for name, place in stored.items():
        if name.endswith(".weight") and not getattr(torch, place.dtype).is_floating_point:
            raise ValueError(f"{name} is in {place.dtype}, not in floating point")
