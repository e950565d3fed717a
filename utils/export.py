"""Model folders that other tools load: weights, config, generation config, tokenizer; whole or not at all."""

import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from utils.models import quiet_transformers
from utils.run_folder import atomic_folder
from utils.tokenizer import save_tokenizer, stop_ids


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
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = ids
    with quiet_transformers(), torch.device("meta"):
        shell = auto_class.from_config(config, dtype=config.dtype)
    ends = [config.eos_token_id] if tokenizer is None else stop_ids(tokenizer)
    ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    ids["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    if shell.can_generate():
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
    """A causal LM's folder. state: whole tensors by the names of its `named_parameters()`. On one rank.

    generation: the settings of the model that it comes from, which are kept.
    """
    write_model(AutoModelForCausalLM, config, state, folder, tokenizer, generation)
