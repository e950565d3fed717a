"""Folders in peft's format: an adapter, with the name of the model that it belongs to. Read, merged, written."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import nn

from utils.errors import UserError
from utils.files import read_json
from utils.models.adapters import Adapted, adapted_layers, inject, merged, peft, place_of
from utils.models.weight_files import open_weights, reason_of, weight_file
from utils.schema import Schema, checked

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of peft's whose adapters are not sums of two factors beside a linear layer.
OTHER_KINDS = ("lora_bias", "target_parameters", "trainable_token_indices", "layer_replication", "megatron_config")
OTHER_KINDS += ("alora_invocation_tokens", "use_qalora", "use_bdlora", "velora_config", "monteclora_config")
OTHER_KINDS += ("arrow_config", "kasa_config")
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")  # names of an adapter's tensors in a layer
PREFIX, HEAD = "base_model.model.", "score.weight"  # of all names of tensors; name of a reward model's head


class _AdapterConfig(Schema):
    """What this toolkit has to know; peft reads the rest."""

    peft_type: Literal["LORA"]
    base_model_name_or_path: str = Field(min_length=1)
    bias: Literal["none"] = "none"
    modules_to_save: list[Literal["score"]] | None = None
    # Others, as PiSSA, change the frozen weights. `true` is Kaiming's.
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal"] = True


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return os.path.isfile(folder / CONFIG) and weight_file(folder) is None  # False for a name that is too long, too


def base_of(folder: Path, flag: str) -> str:
    """Returns the path or hub id of an adapter's model. Raises UserError for what is no plain LoRA adapter."""
    try:
        content = read_json(folder / CONFIG, flag)
        config = checked(_AdapterConfig, content)
        if on := [name for name in OTHER_KINDS if content.get(name)]:
            raise ValueError(f"{on[0]} is on")
    except ValueError as error:
        what = f"{folder}/{CONFIG} is not of a LoRA adapter that can be used here ({error})"
        raise UserError(f"{flag}: {what}; merge it with peft, and pass the whole model") from error
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{flag}: no {WEIGHTS} in {folder}; copy the folder again")
    base = config.base_model_name_or_path
    beside = folder / base
    return str(beside) if not os.path.exists(base) and beside.is_dir() else base


def chain(path: str, flag: str, local: Callable[[str, str], Path]) -> list[tuple[str, Path, str]]:
    """Returns (path or hub id, folder, flag) of a whole model, then of the adapters on it that `path` stands for.

    local: returns the folder of a path and its flag. Raises UserError for an adapter that belongs to itself.
    """
    adapters, seen = [], set()
    while is_adapter(folder := local(path, flag)):
        if folder.resolve() in seen:
            raise UserError(f"{flag}: the adapter in {folder} belongs to itself; set base_model_name_or_path")
        seen.add(folder.resolve())
        adapters.insert(0, (str(path), folder, flag))
        path, flag = base_of(folder, flag), f"{flag} {folder}, base_model_name_or_path"
    return [(str(path), folder, flag), *adapters]


def read_head(folder: Path, flag: str) -> torch.Tensor | None:
    """Returns the weight of a reward model's head in an adapter's folder, None if it has none."""
    with open_weights(folder / WEIGHTS, flag) as tensors:
        return tensors.get_tensor(PREFIX + HEAD) if PREFIX + HEAD in tensors.keys() else None  # noqa: SIM118


def load_adapter(decoder: nn.Module, name: str, folder: Path, flag: str) -> None:
    """Adds an adapter to its decoder, frozen. Raises UserError if it does not fit or is not finite."""
    lora = peft(f"{flag} {folder}")
    try:
        tensors = load_file(folder / WEIGHTS)
        settings = lora.LoraConfig.from_pretrained(str(folder))
        settings.init_lora_weights, settings.modules_to_save, settings.inference_mode = True, None, False
        settings.exclude_modules = None  # the tensors say which layers
        tensors.pop(PREFIX + HEAD, None)
        if other := [key for key in tensors if not key.endswith(PARTS)]:
            raise ValueError(f"{other[0]} does not belong to an adapter of a linear layer")
        part = place_of(decoder)
        tensors = {key.removeprefix(PREFIX).removeprefix(part): x for key, x in tensors.items()}
        settings.target_modules = sorted({key.rpartition(".lora_")[0] for key in tensors})
        for pattern in (settings.rank_pattern, settings.alpha_pattern):  # they name layers as a whole model does
            for key in list(pattern):
                pattern[key.removeprefix(part)] = pattern.pop(key)
        inject(decoder, name, settings, tensors)
        found = lora.set_peft_model_state_dict(decoder, tensors, adapter_name=name)
    except Exception as error:  # peft, safetensors and torch raise all kinds
        raise UserError(f"{flag}: cannot load the adapter in {folder}: {reason_of(error)}") from error
    if found.unexpected_keys:
        other = f"{found.unexpected_keys[0]} and {len(found.unexpected_keys) - 1} more"
        raise UserError(f"{flag}: the adapter in {folder} is of another model ({other}); check base_model_name_or_path")
    for layer in adapted_layers(decoder):
        own = [x for key, x in layer.named_parameters() if f".{name}." in f".{key}."]
        if not all(bool(x.isfinite().all()) for x in own):
            raise UserError(f"{flag}: {folder} holds weights that are not finite; use an earlier checkpoint")
        for x in own:
            x.requires_grad_(False)


def merge_adapters(decoder: nn.Module) -> None:
    """Adds all adapters to the decoder's weights, in float32, and removes them; all weights can be trained then."""
    names = tuple(decoder.peft_config)
    for path, layer in [(path, x) for path, x in decoder.named_modules() if hasattr(x, "lora_A")]:
        with merged(layer, names) as weight:
            whole = weight
        base = layer.get_base_layer()
        base.weight.data = whole
        decoder.set_submodule(path, base)
    del decoder.peft_config
    decoder.requires_grad_(True)  # peft has frozen them


def write_adapter(
    model: Adapted, decoder: nn.Module, base: str, folder: str, head: torch.Tensor | None = None
) -> None:  # fmt: skip
    """Writes the adapters of a model as one, in peft's format. Call it on one rank.

    Several are joined to one whose rank is the sum of theirs. base: path or hub id of the frozen model. head: weight of
    a reward model's or critic's head.
    """
    part = place_of(decoder)
    if len(model.adapters) == 1:
        [name] = model.adapters
        settings = copy.deepcopy(decoder.peft_config[name])
        found = peft("--export").get_peft_model_state_dict(decoder, adapter_name=name, save_embedding_layers=False)
        tensors = {part + key: x for key, x in found.items()}
    else:
        settings, tensors = _joined(model.adapters, decoder, part)
    tensors = {PREFIX + key: x for key, x in tensors.items()}
    if head is not None:
        tensors[PREFIX + HEAD] = head
    settings.base_model_name_or_path, settings.inference_mode = base, True
    settings.task_type, settings.modules_to_save = ("CAUSAL_LM", None) if head is None else ("SEQ_CLS", ["score"])
    settings.save_pretrained(folder)
    whole = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
    save_file(whole, f"{folder}/{WEIGHTS}", {"format": "pt"})


def _joined(adapters: tuple[str, ...], decoder: nn.Module, part: str) -> tuple:
    """Returns (peft's settings, tensors) of one adapter that does what these do together."""
    tensors, ranks = {}, {}
    for path, layer in decoder.named_modules():
        names = [name for name in adapters if name in getattr(layer, "lora_A", ())]
        if names:
            downs = torch.cat([layer.lora_A[name].weight for name in names])
            ups = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], 1)
            tensors |= {f"{part}{path}.lora_A.weight": downs, f"{part}{path}.lora_B.weight": ups}
            ranks[part + path] = len(downs)
    largest = max(ranks.values())
    smaller = {path: rank for path, rank in ranks.items() if rank < largest}
    settings = peft("--export").LoraConfig(
        r=largest, lora_alpha=largest, target_modules=sorted(ranks), rank_pattern=smaller, alpha_pattern=smaller
    )
    return settings, tensors
