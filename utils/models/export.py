"""Model folders that other tools load: weights, config, generation config, tokenizer; whole or not at all."""

import copy
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from utils.errors import UserError
from utils.files import atomic_folder
from utils.models.load import quiet_transformers
from utils.tokenizer import save_tokenizer, stop_ids


def saved_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a folder of this model holds, by name: parameters, tied ones once, and persistent buffers."""
    persistent = module.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    return dict(module.named_parameters()) | buffers


def check_names(auto_class: type, config: PretrainedConfig, state: dict[str, torch.Tensor], what: str) -> None:
    """Raises UserError where `write_model` of the same would leave tensors out, or write some that nothing reads."""
    other = state.keys() ^ saved_tensors(_shell(auto_class, config, torch.float32)).keys()
    if other:
        names = f"{min(other)} and {len(other) - 1} more" if len(other) > 1 else min(other)
        raise UserError(
            f"{what}: a {config.model_type} model cannot be saved as {auto_class.__name__} loads it ({names}); give "
            "another architecture"
        )


def set_ids(config: PretrainedConfig, **ids: int | list[int] | None) -> None:
    """Sets token ids of a config, where a model of texts and images reads them too."""
    for part in (config, config.get_text_config()):
        for name, value in ids.items():
            setattr(part, name, value)


def _shell(auto_class: type, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, without weights."""
    with quiet_transformers(), torch.device("meta"):
        return auto_class.from_config(config, dtype=dtype)


def write_model(
    auto_class: type,
    config: PretrainedConfig,
    state: dict[str, torch.Tensor],
    folder: str,
    tokenizer=None,
    generation: GenerationConfig | None = None,
) -> None:
    """Writes `state` (the names of `auto_class`'s own model) as safetensors with config and tokenizer. On one rank.

    The tokenizer's bos, eos and pad ids go into the config; a model that generates gets its source's settings,
    `generation`, with bos and pad of the tokenizer and all ids that end an answer. A shell without weights does the
    saving, so that it does not matter where and how split the trained model lives.
    """
    config = copy.deepcopy(config)
    vars(config).pop("auto_map", None)  # code that lay beside the weights is not run, and not passed on
    config.dtype = next(iter(state.values())).dtype
    if tokenizer is not None:
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        set_ids(config, **ids)
    shell = _shell(auto_class, config, config.dtype)
    if shell.can_generate():
        text = config.get_text_config()
        ends = [text.eos_token_id] if tokenizer is None else stop_ids(tokenizer)
        ids = {"bos_token_id": text.bos_token_id, "pad_token_id": text.pad_token_id}
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
        shell.generation_config = GenerationConfig(**ids)
    with atomic_folder(folder) as partial:
        with quiet_transformers():
            shell.save_pretrained(partial, state_dict=state)
        if shell.can_generate() and generation is not None:
            _write_settings(generation, ids, Path(partial, "generation_config.json"))
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)


def _write_settings(generation: GenerationConfig, ids: dict, file: Path) -> None:
    """Writes a source's settings with these ids. Not left to transformers, which refuses to save some that it loads."""
    settings = generation.to_diff_dict()
    if not settings.get("_from_model_config"):  # else the source had none of its own
        file.write_text(json.dumps(settings | ids, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_causal_lm(
    config: PretrainedConfig, state: dict[str, torch.Tensor], folder: str, tokenizer,
    generation: GenerationConfig | None = None,
) -> None:  # fmt: skip
    """A causal LM's folder. state: its `saved_tensors`, whole. On one rank.

    generation: the settings of the model that it comes from, which are kept.
    """
    write_model(AutoModelForCausalLM, config, state, folder, tokenizer, generation)
