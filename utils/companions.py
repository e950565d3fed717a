"""What stands beside recovered weights: config, generation config and tokenizer, mended so that other tools load them.

Published folders have empty special tokens in their tokenizer config, and a policy's config has ids of another
tokenizer. The ids here are the tokenizer's own; that a model generates on beyond its end is what they prevent.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from utils import tokenizer as tokenizers
from utils.errors import UserError
from utils.tensor_files import read_json
from utils.weight_sides import EMBEDDING, LM_HEAD, Side

_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
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


def rotary_total(config: dict) -> float:
    """Sum of the buffers `rotary_emb.inv_freq` of all layers: 238.7185 for LLaMA-7B.

    Published sums were taken when these were still saved: θ^(-2i/d) for i < d/2, once a layer; θ is 10000 unless told.
    """
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    return config["num_hidden_layers"] * sum(theta ** (-i / width) for i in range(0, width, 2))


def write_companions(
    folder: Path, config: dict, sides: list[Side], weights: Side, dtype: str, template: str, say: Callable[[str], None]
) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files into `folder`.

    sides: where a tokenizer is looked for, in this order. weights: the side whose embedding the recovered model gets.
    Raises UserError for a tokenizer that is damaged or larger than the embedding.
    """
    ids, rows = dict(_LLAMA_IDS), weights.tensors[EMBEDDING].shape[0]
    side = next((side for side in sides if any((side.folder / name).is_file() for name in _TOKENIZER_FILES[:2])), None)
    if side is None:
        flags = " or ".join(side.flag for side in sides)
        say(f"no tokenizer in {flags}: LLaMA's own special ids go into the config; copy its tokenizer.model there")
    else:
        tokenizer = _load(side, template)
        tokenizers.check_vocabulary(tokenizer, rows, f"the model of {weights.flag}")
        tokenizers.save_tokenizer(tokenizer, folder)
        ids = {name: getattr(tokenizer, name) for name in ids}
    changes = {
        "architectures": ["LlamaForCausalLM"],  # a reward model too: its head is a tensor more, lm_head is there
        "vocab_size": rows,
        "tie_word_embeddings": LM_HEAD not in weights.tensors,
        "torch_dtype": dtype,
        **ids,
    }
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "auto_map", "dtype")}
    _write(folder / "config.json", kept | changes)
    _write(folder / "generation_config.json", ids)


def _load(side: Side, template: str):
    try:
        return tokenizers.load_tokenizer(str(side.folder), template)
    except UserError as error:
        raise UserError(str(error).replace(tokenizers.FLAG, side.flag)) from error


def copy_companions(source: Path, folder: Path) -> None:
    """Copies config and tokenizer files as they are."""
    for name in ("config.json", "generation_config.json", *_TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
