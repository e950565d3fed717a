"""Loading decoders: the folder is checked first, weights arrive in the asked dtype, dropout is off.

Mistakes become one UserError that names the flag and the path; nothing is loaded on top of random weights.
"""

import contextlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from utils.errors import UserError
from utils.hub import download_model, is_hub_id
from utils.tokenizer import check_vocabulary

FLAG = "--hf_model_name_or_path"
_DAMAGED = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError, EOFError)


def load_causal_lm(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None = None,
    tokenizer=None,
    say: Callable[[str], None] = print,
    flag: str = FLAG,
) -> PreTrainedModel:
    """The causal LM in the folder or hub id `path`, in `dtype` on `device`, without dropout, in eval mode.

    With a tokenizer its vocabulary is checked, and the embedding grows for the tags of moss_zh. `flag` is what error
    messages call the path. Raises UserError for a folder that is missing, incomplete, damaged or of another vocabulary.
    """
    folder = model_folder(path, flag)
    model = from_folder(AutoModelForCausalLM, folder, dtype, device, attn_implementation, flag)
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer, f"{flag} {path}", say)
    return model


def model_folder(path: str, flag: str = FLAG) -> Path:
    """The local folder of `path`, downloaded when it is a hub id. UserError unless it holds a config and weights."""
    folder = Path(path)
    if not folder.exists() and is_hub_id(str(path)):
        folder = download_model(str(path), flag)
    if not folder.is_dir():
        raise UserError(f"{flag}: the model folder {path} does not exist; give a Hugging Face folder or a hub id")
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag}: no config.json in {path}; give the folder of a Hugging Face model")
    missing = sorted({file.name for file in tensor_files(folder, flag).values() if not file.is_file()})
    if missing:
        raise UserError(f"{flag}: {path} lacks {', '.join(missing)}, which its index names; copy the folder again")
    return folder


def from_folder(
    auto_class: type, folder: Path, dtype: torch.dtype, device: torch.device, attn_implementation: str | None, flag: str
) -> PreTrainedModel:
    """`auto_class.from_pretrained`, straight into `dtype`; refuses weights that are missing or not finite."""
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if device.type == "cuda":
        options["device_map"] = {"": device}
    try:
        with quiet_transformers():
            config = without_dropout(AutoConfig.from_pretrained(folder))
            model, report = auto_class.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, **options
            )
    except _DAMAGED as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{flag}: cannot load the model in {folder}: {reason}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{flag}: {folder} has no weights for {missing[0]} (and {len(missing) - 1} more); give a folder of a "
            f"whole {type(model).__name__}"
        )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"{flag}: {folder} holds weights that are not finite ({name}); give an earlier checkpoint")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The config with every dropout probability at 0: log-probs of rollout and update must be the same numbers."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass. The non-reentrant kind, which needs no inputs with gradients."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


def check_window(model: nn.Module, max_tokens: int, flag: str) -> None:
    """Raises UserError when `max_tokens` of `flag` are more than the positions that the model was trained on."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and max_tokens > window:
        raise UserError(f"{flag} {max_tokens} is longer than the model's window: give at most {window}")


def fit_vocabulary(model: PreTrainedModel, tokenizer, what: str, say: Callable[[str], None]) -> None:
    """Grows the embedding for the tokenizer's moss_zh tags, aloud. UserError when other tokens lie beyond it."""
    rows = model.get_input_embeddings().weight.shape[0]
    needed = check_vocabulary(tokenizer, rows, what)
    if needed > rows:
        resize_embeddings(model, needed)
        say(f"{what}: embedding resized from {rows} to {needed} tokens; the new rows are the mean of the old ones")


def resize_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Grow input and output embeddings to `rows`; each new row is the mean of the old ones, so no token stands out."""
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            with torch.no_grad():
                layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)


def tensor_files(folder: Path, flag: str = FLAG) -> dict[str, Path]:
    """Name of every tensor in the folder -> the file that holds it. Reads indices and headers, no tensors."""
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            try:
                names = json.loads(index.read_text("utf-8"))["weight_map"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{flag}: {index} is damaged ({error}); copy it again") from error
            return {name: folder / file for name, file in names.items()}
    for file in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        if file.is_file():
            with _weights(file, flag) as tensors:
                return dict.fromkeys(tensors.keys(), file)
    raise UserError(f"{flag}: no model.safetensors or pytorch_model.bin in {folder}; give the folder of a whole model")


def read_tensor(file: Path, name: str, flag: str = FLAG) -> torch.Tensor:
    """One tensor out of a .safetensors or .bin file; the rest stays on the disk."""
    with _weights(file, flag) as tensors:
        return tensors.get_tensor(name) if file.suffix == ".safetensors" else tensors[name].clone()


@contextlib.contextmanager
def _weights(file: Path, flag: str) -> Iterator:
    """Lazy mapping of a weight file. Only tensors are unpickled from a .bin, never code."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        else:
            yield torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except _DAMAGED as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{flag}: {file} is not readable or damaged ({reason}); copy it again") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers keeps its loading report to itself: we read it and say what matters."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
