"""Loads decoders in a given dtype, without dropout, after checks of their folder.

Errors are UserErrors that name the flag and the path. No weight keeps its random initialisation.
"""

import contextlib
import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from utils.errors import Say, UserError
from utils.hub import download_model, is_hub_id
from utils.models.adapter_folder import chain, load_adapter, merge_adapters
from utils.models.adapters import Adapted, check_sum
from utils.models.check import check_forward
from utils.models.compile import layers_of
from utils.models.config import check_counts, check_memory, read_config
from utils.models.split import Split, gathered, not_finite, split_rest, splitting_layers, whole_shape
from utils.models.weight_files import reason_of, stored_tensors, tensor_files
from utils.tokenizer import check_vocabulary, has_tokenizer
from utils.watchdog import report_progress

FLAG = "--hf_model_name_or_path"


def load_causal_lm(
    path: str, dtype: torch.dtype, device: torch.device, attn_implementation: str | None = None, tokenizer=None,
    say: Say = print, flag: str = FLAG, split: Split | None = None, merge: bool = True,
) -> PreTrainedModel:  # fmt: skip
    """Returns the causal LM in the folder or hub id `path`, in `dtype` on `device`, without dropout, in eval mode.

    tokenizer: its vocabulary is checked, and the embedding grows for the tags of moss_zh. flag: the flag of `path`.
    split: splits the weights over the ranks as they are read. Collective then. merge: False leaves adapters out. Raises
    UserError for a folder that is damaged, and for an architecture that fails utils/models/check.py.
    """
    model = from_folder(AutoModelForCausalLM, path, dtype, device, attn_implementation, flag, say, split, merge)
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer, f"{flag} {path}", say, grows=merge)
    split_rest(model, split, device)
    with gathered(model):
        check_forward(model, f"{flag} {path}", say)
    return model


def share_adapters(
    model: Adapted, decoder: nn.Module, path: str, flag: str = FLAG, names: dict[Path, str] | None = None
) -> None:  # fmt: skip
    """Adds the adapters that `path` stands for to a decoder that was read without them, for the model's forwards.

    names: folder -> name of the adapters that the decoder has; new ones are added to it.
    """
    names, folders = {} if names is None else names, adapter_folders(path, flag)
    model.share(decoder)
    for folder in folders:
        if folder not in names:
            names[folder] = f"read_{len(names)}"
            load_adapter(decoder, names[folder], folder, flag)
    own = [names[folder] for folder in folders]
    check_sum(decoder, *own)
    model.share(decoder, *own)


def model_folder(path: str, flag: str = FLAG) -> Path:
    """Returns the local folder of `path`, downloaded if it is a hub id. Raises UserError without config or weights.

    For a folder with an adapter it is that of the model that the adapter belongs to.
    """
    return _folders(path, flag)[0][1]


def whole_model(path: str, flag: str = FLAG) -> str:
    """Returns what adapters of the model in `path` call their frozen model: a hub id, or an absolute path."""
    name = _folders(path, flag)[0][0]
    return name if is_hub_id(name) else os.path.abspath(name)


def adapter_folders(path: str, flag: str = FLAG) -> list[Path]:
    """Returns the folders of the adapters that `path` stands for, the first one first; none if it is a whole model."""
    return [folder for _, folder, _ in chain(path, flag, _local_folder)[1:]]


def settings_folder(path: str, flag: str = FLAG) -> Path:
    """Returns the folder whose config.json says what a model's scalars mean: of its adapter, if that has one."""
    return next(folder for _, folder in _folders(path, flag)[::-1] if (folder / "config.json").is_file())


def tokenizer_folder(path: str, flag: str = FLAG) -> Path:
    """Returns the folder with a model's tokenizer: of its adapter, if that has one. It may have none."""
    folders = [folder for _, folder in _folders(path, flag)]
    return next((folder for folder in folders[::-1] if has_tokenizer(folder)), folders[0])


def _folders(path: str, flag: str) -> list[tuple[str, Path]]:
    """Returns (path or hub id, folder) of a whole model, and of its adapters."""
    (path, folder, flag), *adapters = chain(path, flag, _local_folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag}: no config.json in {path}; use the folder of a Hugging Face model")
    _check_known(read_config(folder, flag), path, flag)
    tensor_files(folder, flag)  # checks that they are there
    return [(path, folder), *((name, place) for name, place, _ in adapters)]


def _local_folder(path: str, flag: str) -> Path:
    folder = Path(path)
    if not os.path.exists(path) and is_hub_id(str(path)):
        folder = download_model(str(path), flag)
    if not os.path.isdir(folder):
        problem = "is a file" if os.path.exists(folder) else "does not exist"
        raise UserError(f"{flag}: the model folder {path} {problem}; use a Hugging Face folder or a hub id")
    return folder


def _check_known(config: dict, path: str, flag: str) -> None:
    """Raises UserError for an architecture that is not in transformers: code in a model's folder is not run."""
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING.keys():  # noqa: SIM118 - `in` of the mapping itself fails for what cannot be hashed
        return
    reason = f"has the model_type {kind!r}, which transformers does not include" if kind else "has no model_type"
    if "auto_map" in config:
        reason = "needs code of its own (auto_map), which is not run here"
    raise UserError(f"{flag}: {path}/config.json {reason}; use a model that transformers includes")


@contextlib.contextmanager
def _loading(folder: Path, flag: str, kernel: str | None = None) -> Iterator[None]:
    """Context in which transformers' errors about a folder, or about an attention kernel, become UserErrors."""
    try:
        with quiet_transformers():
            yield
    except UserError:
        raise
    except Exception as error:
        if kernel and isinstance(error, ImportError):
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise UserError(f"--attn_implementation {kernel}: {reason}. Install it, or leave the flag out") from error
        raise UserError(f"{flag}: cannot load the model in {folder}: {reason_of(error)}") from error


def attention_cap(config: PretrainedConfig) -> float | None:
    """Returns the soft cap of a model's attention scores (Gemma 2), None if it has none."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def _attention_kernel(asked: str | None, config: PretrainedConfig, folder: Path, flag: str, say: Say) -> str | None:
    """Returns the attention kernel to load a model with, None for transformers' choice.

    Raises UserError for one that is not in transformers: "owner/name" is code from the hub. transformers' sdpa ignores
    caps of attention scores.
    """
    known = sorted(name for name in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()) if name.isidentifier())
    if asked and asked not in known:
        raise UserError(f"--attn_implementation {asked} is unknown; use one of {', '.join(known)}")
    for part in (config, config.get_text_config()):
        if not asked and part._attn_implementation and part._attn_implementation not in known:
            asks = f"asks for the attention kernel {part._attn_implementation!r}, code from the hub"
            raise UserError(f"{flag}: {folder}/config.json {asks}; remove it, or pass --attn_implementation sdpa")
    cap = attention_cap(config)
    if cap and asked in (None, "sdpa"):
        change = "sdpa ignores" if asked else "eager is used, since sdpa ignores"
        say(f"{flag} {folder}: --attn_implementation {change} its cap of attention scores, {cap:g}")
        return asked or "eager"
    return asked


def from_folder(
    auto_class: type, path: str, dtype: torch.dtype, device: torch.device, attn_implementation: str | None,
    flag: str, say: Say = print, split: Split | None = None, merge: bool = True,
) -> PreTrainedModel:  # fmt: skip
    """Calls `auto_class.from_pretrained` in `dtype`. Raises UserError for weights that are missing or not finite.

    merge: merge the adapters that `path` stands for. split: the layers are split over the ranks; the caller must call
    `split_rest`.
    """
    folder, adapters = model_folder(path, flag), adapter_folders(path, flag) if merge else []
    if adapters:  # they are merged into whole weights, which `split_rest` splits
        split = None
    options = {"device_map": {"": device}} if device.type == "cuda" and split is None else {}
    with _loading(folder, flag):
        stored = stored_tensors(folder, flag)
        config = without_dropout(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        check_counts(config, stored)
        _window(config.get_text_config())
    if kernel := _attention_kernel(attn_implementation, config, folder, flag, say):
        options["attn_implementation"] = kernel
    with _loading(folder, flag, attn_implementation):
        outline = meta_model(auto_class, config, dtype)
        check_memory(outline, stored)
        with splitting_layers(split, outline):
            model, report = auto_class.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False,
                ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    if report["mismatched_keys"]:
        name, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(f"{flag}: {folder} holds {name} in shape {list(stored)}, not {list(wanted)}; copy it again")
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{flag}: {folder} has no weights for {missing[0]} and {len(missing) - 1} more; copy it again")
    if model.config.is_encoder_decoder:
        raise UserError(f"{flag}: {folder}/config.json is of an encoder-decoder; use a decoder")
    if name := not_finite(model):
        raise UserError(f"{flag}: {folder} holds weights that are not finite ({name}); use an earlier checkpoint")
    for i, adapter in enumerate(adapters):
        load_adapter(model.base_model, f"loaded_{i}", adapter, flag)
    if adapters:
        merge_adapters(model.base_model)
    report_progress(f"load of {folder}")
    return _without_dropout_modules(model).eval()


def _without_dropout_modules(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def meta_model(auto_class: type, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model of a config on the meta device."""
    with quiet_transformers(), torch.device("meta"):
        return auto_class.from_config(copy.deepcopy(config), dtype=dtype)


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Sets a config's dropout probabilities to 0, so that rollout and update give the same log-probs. Returns it."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, type(value)(0))  # of the same type, which some check
        elif isinstance(value, PretrainedConfig):
            without_dropout(value)
    return config


def enable_checkpointing(model: PreTrainedModel, kept: int = 0) -> None:
    """Enables gradient checkpointing, non-reentrant, in all layers but the last `kept`."""
    if not model.supports_gradient_checkpointing:
        raise UserError(f"--gradient_checkpoint: {type(model).__name__} does not support it; leave it out")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers_of(model)[::-1][:kept]:
        layer.gradient_checkpointing = False


def training_mode(model: nn.Module) -> None:
    """Sets training mode in modules with gradient checkpointing, which requires it, and eval mode in all others.

    The update's forward then equals that of scoring: no dropout, no routers that sample experts (PhiMoE).
    """
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


def window_of(model: nn.Module) -> int | None:
    """The positions that a model was trained on, if its config says so; with LongRoPE those before it changes."""
    return _window(model.config.get_text_config())


def window_at(path: str, flag: str = FLAG) -> int | None:
    """`window_of` the model in a folder or hub id, of which only config.json is read."""
    folder = model_folder(path, flag)
    with _loading(folder, flag):
        return _window(AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config())


def _window(config: PretrainedConfig) -> int | None:
    windows = (getattr(config, "max_position_embeddings", None), switching_position(config))
    return min(filter(None, windows), default=None)


def switching_position(config: PretrainedConfig) -> int | None:
    """Returns the row length above which rotary frequencies change for a whole batch (LongRoPE, dynamic), or None."""
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]  # some have one per layer type
    changing = [rope for rope in kinds if re.search("dynamic|longrope", str(rope.get("rope_type")))]
    return min(filter(None, (rope.get("original_max_position_embeddings") for rope in changing)), default=None)


def check_window(model: nn.Module, max_tokens: int, flag: str) -> None:
    """Raises UserError if `max_tokens` of `flag` exceed the positions that the model was trained on."""
    window = window_of(model)
    if window and max_tokens > window:
        reason = " is longer than the model's window"
        if window == switching_position(model.config.get_text_config()):
            reason = f": one row of more than {window} tokens changes the rotary positions of its whole batch"
        raise UserError(f"{flag} {max_tokens}{reason}; use at most {window}")


def embedding_rows(model: PreTrainedModel) -> int:
    """Returns the number of tokens that a model has embeddings for."""
    return whole_shape(model.get_input_embeddings().weight)[0]


def fit_vocabulary(model: PreTrainedModel, tokenizer, what: str, say: Say, grows: bool = True) -> None:
    """Grows the embedding for the tokenizer's moss_zh tags. Raises UserError if other tokens are beyond it.

    grows: False: these are an error, too, because adapters cannot train new rows.
    """
    rows = embedding_rows(model)
    needed = check_vocabulary(tokenizer, rows, what)
    if needed > rows and not grows:
        advice = "train all weights first (sft.train without --lora_rank), and adapters on the result"
        raise UserError(f"{what} has no embeddings for the tags of moss_zh, which --lora_rank cannot train; {advice}")
    if needed > rows:
        resize_embeddings(model, needed)
        say(f"{what}: embedding resized from {rows} to {needed} tokens; the new rows are the mean of the old ones")


def resize_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Grows input and output embeddings to at least `rows`; each new row is the mean of the old ones."""
    old = embedding_rows(model)
    if old >= rows:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            with torch.no_grad():
                layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context in which transformers prints neither its loading report nor a progress bar."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
