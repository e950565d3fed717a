"""Writes model folders that other tools load: weights, config, generation config, tokenizer. Atomic."""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from utils.errors import UserError
from utils.files import atomic_folder, write_json
from utils.models.adapter_folder import write_adapter
from utils.models.adapters import BASE, Adapted, merged
from utils.models.load import meta_model, quiet_transformers, whole_model
from utils.tokenizer import save_tokenizer, stop_ids


def saved_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the tensors of a model's folder by name: parameters, tied ones once, and persistent buffers."""
    persistent = module.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    return dict(module.named_parameters()) | buffers


def without_adapters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns tensors of a model with adapters by their names without, and none of the adapters themselves."""
    return {name.replace(BASE, ""): x for name, x in tensors.items() if "lora_" not in name}


def merged_tensors(model: Adapted) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) of a model's folder, with its adapters merged: those of the model without adapters."""
    layers = {f"{path}.{BASE}weight": x for path, x in model.named_modules() if hasattr(x, "lora_A")}
    dtype = next(x.dtype for x in model.parameters() if not x.requires_grad)
    for key, x in saved_tensors(model).items():
        if key in layers:
            with merged(layers[key], model.adapters) as weight:
                yield key.replace(BASE, ""), weight
        elif "lora_" not in key:
            yield key.replace(BASE, ""), x.detach().to(dtype if x.requires_grad else x.dtype)


def check_names(auto_class: type, config: PretrainedConfig, state: dict[str, torch.Tensor], what: str) -> None:
    """Raises UserError if `write_model` would omit tensors, or write some that `auto_class` does not load."""
    other = state.keys() ^ saved_tensors(meta_model(auto_class, config, torch.float32)).keys()
    if other:
        names = f"{min(other)} and {len(other) - 1} more" if len(other) > 1 else min(other)
        wrong = f"a {config.model_type} model cannot be saved as {auto_class.__name__} ({names})"
        raise UserError(f"{what}: {wrong}; use another architecture")


def set_ids(config: PretrainedConfig, **ids: int | list[int] | None) -> None:
    """Sets token ids of a config, and of its text config in models of texts and images."""
    for part in (config, config.get_text_config()):
        for name, value in ids.items():
            setattr(part, name, value)


def write_model(
    auto_class: type, config: PretrainedConfig, state: dict[str, torch.Tensor], folder: str, tokenizer=None,
    generation: GenerationConfig | None = None,
) -> None:  # fmt: skip
    """Writes `state` (names of `auto_class`'s model) as safetensors, with config and tokenizer. Call it on one rank.

    The config gets the tokenizer's bos, eos and pad ids. generation: settings of the source model; they are written
    with the tokenizer's ids. A model on the meta device does the saving, as the trained one may be split over ranks.
    """
    config = copy.deepcopy(config)
    vars(config).pop("auto_map", None)  # code of the source folder is not run, and not exported
    config.dtype = next(iter(state.values())).dtype
    if tokenizer is not None:
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        set_ids(config, **ids)
    shell = meta_model(auto_class, config, config.dtype)
    if shell.can_generate():
        text = config.get_text_config()
        ends = [text.eos_token_id] if tokenizer is None else stop_ids(tokenizer)
        ids = {"bos_token_id": text.bos_token_id, "pad_token_id": text.pad_token_id}
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
        shell.generation_config = GenerationConfig(**ids)
    with atomic_folder(folder) as partial:
        with quiet_transformers():
            shell.save_pretrained(partial, state_dict=state)
        settings = generation.to_diff_dict() if generation is not None and shell.can_generate() else {}
        if settings and not settings.get("_from_model_config"):  # transformers refuses to save some that it loads
            write_json(f"{partial}/generation_config.json", settings | ids)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)


def save_lm_adapter(model: Adapted, decoder: nn.Module, lm: PreTrainedModel, path: str, folder: str, tokenizer) -> None:
    """Writes the adapters of a causal LM that was read from `path`. Call it on one rank."""
    with atomic_folder(folder) as partial:
        write_adapter(model, decoder, whole_model(path), partial)
        lm.config.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)


def save_causal_lm(
    config: PretrainedConfig, state: dict[str, torch.Tensor], folder: str, tokenizer,
    generation: GenerationConfig | None = None,
) -> None:  # fmt: skip
    """Writes a causal LM's folder. Call it on one rank. state: all its `saved_tensors`. generation: its settings."""
    write_model(AutoModelForCausalLM, config, state, folder, tokenizer, generation)
