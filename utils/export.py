"""Model folders that other tools load: weights, config, generation config, tokenizer; whole or not at all."""

import copy

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from utils.models import quiet_transformers
from utils.run_folder import atomic_folder
from utils.tokenizer import save_tokenizer


def write_model(
    auto_class: type,
    config: PretrainedConfig,
    state: dict[str, torch.Tensor],
    folder: str,
    tokenizer=None,
    **generation: float,
) -> None:
    """Writes `state` (the names of `auto_class`'s own model) as safetensors with config and tokenizer. On one rank.

    The tokenizer's bos, eos and pad ids go into the config; `generation` goes into the generation config. A shell
    without weights does the saving, so that it does not matter where and how split the trained model lives.
    """
    config = copy.deepcopy(config)
    vars(config).pop("auto_map", None)  # code that lay beside the weights is not run, and not passed on
    config.dtype = next(iter(state.values())).dtype
    if tokenizer is not None:
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = ids
    with quiet_transformers(), torch.device("meta"):
        shell = auto_class.from_config(config, dtype=config.dtype)
    if shell.can_generate():
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        shell.generation_config = GenerationConfig(**ids, pad_token_id=config.pad_token_id, **generation)
    with atomic_folder(folder) as partial:
        with quiet_transformers():
            shell.save_pretrained(partial, state_dict=state)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)


def save_causal_lm(
    config: PretrainedConfig, state: dict[str, torch.Tensor], folder: str, tokenizer, **generation: float
) -> None:
    """A causal LM's folder. state: whole tensors by the names of its `named_parameters()`. On one rank.

    generation: how answers are to be sampled, by the names of transformers' GenerationConfig.
    """
    write_model(AutoModelForCausalLM, config, state, folder, tokenizer, **generation)
