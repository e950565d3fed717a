"""The two folders that a weight diff connects: opened lazily, their parameters told from the rest, and compared."""

import os
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.hub import download_model, is_hub_id
from utils.manifest import Manifest, read_manifest
from utils.tensor_files import DTYPES, Stored, first_names, open_weights

PATCH_ENDINGS = (".patch_index", ".patch_value")  # of the names of a patch's two tensors (utils/weight_arithmetic.py)
REWARD_HEAD = "reward_head.weight"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BUFFER = "rotary_emb.inv_freq"  # models of 2023 saved it; today's compute it


@dataclass(frozen=True)
class Side:
    """A folder of weights. tensors: its parameters, all of `dtype`, in the order of the files; patches: apart."""

    flag: str
    folder: Path
    tensors: dict[str, Stored]
    patches: dict[str, Stored]
    dtype: str
    manifest: Manifest | None


def is_difference(name: str) -> bool:
    """Whether a diff holds this tensor as a difference. All others it holds whole."""
    return "layers" in name


def open_side(path: str, flag: str) -> Side:
    """Opens the local folder or hub id `path`. Raises UserError, naming `flag`, when anything is wrong with it."""
    folder = download_model(path, flag) if is_hub_id(path) else Path(path)
    if not os.path.isdir(folder):
        raise UserError(f"{flag}: the folder {path} does not exist; give a model folder, or a hub id (owner/name)")
    stored = open_weights(folder, flag)
    patches = {name: place for name, place in stored.items() if name.endswith(PATCH_ENDINGS)}
    tensors = {name: place for name, place in stored.items() if name not in patches and not name.endswith(_BUFFER)}
    if EMBEDDING not in tensors:
        raise UserError(f"{flag}: no {EMBEDDING} in {folder}; give a LLaMA model in Hugging Face layout")
    return Side(flag, folder, tensors, patches, _only_dtype(tensors, flag), read_manifest(folder, flag))


def _only_dtype(tensors: dict[str, Stored], flag: str) -> str:
    examples: dict[str, str] = {}
    for name, place in tensors.items():
        examples.setdefault(place.dtype, name)
    described = ", ".join(f"{dtype} ({name})" for dtype, name in examples.items())
    if len(examples) != 1:
        raise UserError(f"{flag} mixes dtypes: {described or 'none at all'}; give weights that are all of one dtype")
    (dtype,) = examples
    if dtype not in DTYPES:
        raise UserError(f"{flag} holds {described}: give weights in one of {', '.join(DTYPES)}")
    return dtype


def check_pair(raw: Side, other: Side) -> None:
    """Raises UserError unless `other` has all tensors of `raw`, differences in the same shapes, only whole ones more.

    raw: the base. other: a diff against it, or the model that one is to be made of.
    """
    _check_names(raw, other, list(raw.tensors))
    _check_names(other, raw, [name for name in other.tensors if is_difference(name)])
    for name, place in other.tensors.items():
        if is_difference(name) and place.shape != raw.tensors[name].shape:
            shapes = f"{list(raw.tensors[name].shape)} in {raw.flag} and {list(place.shape)} in {other.flag}"
            raise UserError(f"{name} has shape {shapes}; give folders of models of one size")


def _check_names(source: Side, other: Side, names: list[str]) -> None:
    missing = [name for name in names if name not in other.tensors]
    if missing:
        raise UserError(
            f"{other.flag} lacks {len(missing)} tensors that {source.flag} has: {first_names(missing)}; give folders "
            "of models of one architecture"
        )


def check_model_type(side: Side, model_type: str) -> None:
    """Raises UserError when a reward model's head is there and should not be, or the other way round."""
    if (REWARD_HEAD in side.tensors) == (model_type == "reward"):
        return
    wrong = "lacks" if model_type == "reward" else "holds"
    raise UserError(
        f"--model_type {model_type}, but {side.flag} {wrong} {REWARD_HEAD}: give the model type that it is of"
    )
