"""What the cases name in braces: tiny models and data, sound ones and broken ones, made when first asked for."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from reward.model import load_scalar_model, save_scalar_model
from tests.helpers.live_code import bring_own_code, bring_own_tokenizer, live_pickle
from tests.helpers.tiny import SAMPLES, tiny_llama_folder, tiny_tokenizer_folder
from tests.helpers.tiny_run import SIZES, build_inputs, write_json
from tests.helpers.weights import random_weights, save_folder
from utils.tokenizer import load_tokenizer

DIALOGUES = [[f"Question {i}?", f"Answer {i}."] for i in range(8)]
WEIGHTS, UP_PROJ = "model.safetensors", "model.layers.0.mlp.up_proj.weight"


class Materials(dict):
    """Name -> path, under `folder`."""

    def __init__(self, folder: Path):
        super().__init__(vars(build_inputs(folder)))
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        self[name] = BUILDERS[name](self, self.folder / name)
        return self[name]


def written(content) -> Callable:
    """A builder of a JSON file, or of a text file."""

    def build(_: Materials, file: Path) -> Path:
        if isinstance(content, str):
            file.write_text(content)
            return file
        return write_json(file.with_suffix(".json"), content)

    return build


def altered(source: str, change: Callable[[Path], object]) -> Callable:
    """A builder of a copy of another folder with something changed in it."""

    def build(materials: Materials, folder: Path) -> Path:
        shutil.copytree(materials[source], folder)
        change(folder)
        return folder

    return build


def both(*changes: Callable) -> Callable:
    """Several changes, one after the other."""
    return lambda folder: [change(folder) for change in changes]


def without(name: str) -> Callable:
    """A change: the file is not there."""
    return lambda folder: (folder / name).unlink()


def holding(name: str, content: str | bytes) -> Callable:
    """A change: this is all that the file holds."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str, size: int) -> Callable:
    """A change: the file ends after so many bytes."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def config(**changes) -> Callable:
    """A change of config.json; None takes a key out."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        write_json(folder / "config.json", {key: value for key, value in values.items() if value is not None})

    return change


def weights(edit: Callable[[dict], dict | None]) -> Callable:
    """A change of the tensors: `edit` changes the dict, or gives another."""

    def change(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        state = edit(state) or state
        save_file({name: x.contiguous() for name, x in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def index(content) -> Callable:
    """A change: this index is in the place of the weights' single file, which would come before it."""
    return lambda folder: write_json((folder / WEIGHTS).rename(folder / f"{WEIGHTS}.index.json"), content)


def live_bin(name: str = "pytorch_model.bin", layout: str = "zip") -> Callable:
    """A change: weights in a pickle that would run code."""

    def change(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        live_pickle(folder / name, folder / "ran", state, layout)

    return change


def scalar(folder: Path, vocab: int, seed: int) -> Path:
    """A reward model with a tokenizer of its own."""
    base = tiny_llama_folder(folder / "base", vocab, seed, tokenizer=False, **SIZES)
    tokenizer = load_tokenizer(str(tiny_tokenizer_folder(folder / "base", vocab)), "moss_en")
    model = load_scalar_model(str(base), torch.float32, torch.device("cpu"), say=str)
    save_scalar_model(model, str(folder / "model"), tokenizer=tokenizer)
    return folder / "model"


def words_without_end(_: Materials, folder: Path) -> Path:
    """A tokenizer that knows no end of a sequence."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    return folder


def first_nan(name: str) -> Callable:
    """For `weights`: a NaN in one tensor."""

    def edit(state: dict) -> None:
        state[name].view(-1)[0] = torch.nan

    return edit


def recovered(change: Callable) -> Callable:
    """A builder of LLaMA weights for the merge commands."""
    return lambda _, folder: save_folder(folder, change())


half = partial(random_weights, dtype=torch.float16)
POLICIES: dict[str, Callable] = {
    # Folders of models that are not whole.
    "no_config": without("config.json"),
    "no_weights": without(WEIGHTS),
    "broken_config": holding("config.json", '{"model_type": "llama",'),
    "list_as_config": holding("config.json", "[]"),
    "latin_config": holding("config.json", b'{"model_type": "ll\xe4ma"}'),
    "no_model_type": config(model_type=None),
    "unknown_model_type": config(model_type="llama9"),
    "text_as_size": config(hidden_size="big"),
    "heads_that_do_not_divide": config(num_attention_heads=3),
    "other_size": config(hidden_size=48),
    "one_more_layer": config(num_hidden_layers=3),
    "quantized": config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "own_code": lambda folder: bring_own_code(folder, folder / "ran"),
    "own_tokenizer": lambda folder: bring_own_tokenizer(folder, folder / "ran"),
    # Weights that are damaged.
    "cut_weights": cut(WEIGHTS, 20000),
    "cut_header": cut(WEIGHTS, 40),
    "empty_weights": holding(WEIGHTS, b""),
    "html_as_weights": holding(WEIGHTS, "<!DOCTYPE html><html><body>404</body></html>"),
    "lfs_pointer": holding(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "nan_weights": weights(first_nan("model.norm.weight")),
    "no_norm": weights(lambda state: {k: x for k, x in state.items() if k != "model.norm.weight"}),
    "other_names": weights(lambda state: {f"module.{k}": x for k, x in state.items()}),
    "live_bin": live_bin(),
    "live_legacy_bin": live_bin(layout="legacy"),
    "pickle_as_safetensors": live_bin(WEIGHTS),
    "list_in_bin": both(without(WEIGHTS), lambda folder: torch.save([1, 2], folder / "pytorch_model.bin")),
    "kernel_of_others": config(attn_implementation="someone/attention"),
    "cut_bin": both(live_bin(), cut("pytorch_model.bin", 900)),
    "broken_index": index({"weight_map": 3}),
    "numbers_in_index": index({"weight_map": {"lm_head.weight": 3}}),
    "absent_shard": index({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}),
    "shard_elsewhere": index({"weight_map": {"lm_head.weight": "../policy/model.safetensors"}}),
    # Tokenizers.
    "no_tokenizer": without("tokenizer.model"),
    "broken_tokenizer": holding("tokenizer.model", "no SentencePiece"),
    "broken_tokenizer_config": holding("tokenizer_config.json", "{"),
    "odd_added_tokens": holding("added_tokens.json", '{"<tag>": "four hundred"}'),
    "broken_tokenizer_json": both(without("tokenizer.model"), holding("tokenizer.json", "{}")),
}
REWARDS: dict[str, Callable] = {
    "nan_head": weights(first_nan("score.weight")),
    "two_labels": weights(lambda s: s | {"score.weight": s["score.weight"].repeat(2, 1)}),
    "head_of_another_size": weights(lambda s: s | {"score.weight": torch.ones(1, 8)}),
    "text_as_center": config(score_center="high"),
    "list_as_labels": config(id2label=["a"]),
    "toxicity": config(id2label={"0": "toxicity"}, label2id={"toxicity": 0}),
    "live_reward": live_bin(),
}
BUILDERS: dict[str, Callable[[Materials, Path], Path]] = {
    "judge": lambda _, folder: scalar(folder, 400, 5),
    "other_judge": lambda _, folder: scalar(folder, 370, 6),
    "pairs": lambda _, __: SAMPLES / "en" / "preferences" / "train.jsonl",
    "eight": written(DIALOGUES),
    "three": written(DIALOGUES[:3]),
    "records": written([["Hi", "Hello"]]),
    "plain_pairs": written([{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(9)]),
    "file": written("kept"),
    "raw": recovered(partial(half, 1)),
    "diff": recovered(partial(half, 2)),
    "no_end": words_without_end,
    "small_vocabulary": lambda _, folder: tiny_llama_folder(folder, vocab=300, tokenizer=False, **SIZES),
    "not_a_llama": recovered(lambda: {"transformer.wte.weight": torch.ones(3, 2)}),
    "fewer_tensors": recovered(lambda: {k: x for k, x in half(1).items() if "layers.1" not in k}),
    "other_shapes": recovered(lambda: half(2) | {UP_PROJ: torch.ones(19, 8).half()}),
    "mixed_dtypes": recovered(lambda: half(2) | {"model.norm.weight": torch.ones(8)}),
    "integers": recovered(lambda: {k: x.to(torch.int8) for k, x in half(2).items()}),
    "nan_diff": recovered(lambda: half(2) | {UP_PROJ: torch.full((20, 8), torch.nan).half()}),
    "bad_manifest": altered("diff", holding("weight_manifest.json", "{}")),
    "infinite_judge": altered("judge", weights(lambda s: s | {"score.weight": torch.full((1, 32), 3.4e38)})),
    "small_judge": altered("judge", config(max_position_embeddings=16)),
    "live_raw": altered("raw", live_bin()),
    "no_llama_config": altered("diff", config(model_type="gpt2")),
    "damaged_tokenizer_diff": altered("diff", holding("tokenizer.model", "no SentencePiece")),
}
BUILDERS |= {name: altered("policy", change) for name, change in POLICIES.items()}
BUILDERS |= {name: altered("reward", change) for name, change in REWARDS.items()}
