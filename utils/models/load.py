"""Loading decoders: the folder is checked first, weights arrive in the asked dtype, dropout is off.

Mistakes become one UserError that names the flag and the path; nothing is loaded on top of random weights.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from utils.errors import UserError
from utils.files import read_json
from utils.hub import download_model, is_hub_id
from utils.models.check import check_forward
from utils.models.compile import layers_of
from utils.models.weight_files import DAMAGED, reason_of, tensor_files
from utils.tokenizer import check_vocabulary

FLAG = "--hf_model_name_or_path"


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
    messages call the path. Raises UserError for a folder that is missing, incomplete, damaged or of another vocabulary,
    and for an architecture whose numbers would be others here than in its own forward (utils/models/check.py).
    """
    folder = model_folder(path, flag)
    model = from_folder(AutoModelForCausalLM, folder, dtype, device, attn_implementation, flag, say)
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer, f"{flag} {path}", say)
    check_forward(model, f"{flag} {path}", say)
    return model


def model_folder(path: str, flag: str = FLAG) -> Path:
    """The local folder of `path`, downloaded when it is a hub id. UserError unless it holds a config and weights."""
    folder = Path(path)
    if not os.path.exists(path) and is_hub_id(str(path)):
        folder = download_model(str(path), flag)
    if not os.path.isdir(folder):
        problem = "is a file" if os.path.exists(folder) else "does not exist"
        raise UserError(f"{flag}: the model folder {path} {problem}; give a Hugging Face folder or a hub id")
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag}: no config.json in {path}; give the folder of a Hugging Face model")
    _check_known(read_json(folder / "config.json", flag), path, flag)
    missing = sorted({file.name for file in tensor_files(folder, flag).values() if not file.is_file()})
    if missing:
        raise UserError(f"{flag}: {path} lacks {', '.join(missing)}, which its index names; copy the folder again")
    return folder


def _check_known(config: dict, path: str, flag: str) -> None:
    """Raises UserError for an architecture that transformers does not bring itself: code beside weights is not run."""
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING.keys():  # noqa: SIM118 - `in` of the mapping itself fails for what cannot be hashed
        return
    if "auto_map" in config:
        raise UserError(
            f"{flag}: {path} needs code of its own (auto_map in its config.json), which is not run here; give a model "
            "that transformers knows by itself"
        )
    problem = f"names the model_type {kind!r}, which this transformers does not know" if kind else "names no model_type"
    raise UserError(f"{flag}: {path}/config.json {problem}; give a model that transformers knows")


def _check_kernel(asked: str | None, config: PretrainedConfig, folder: Path, flag: str) -> None:
    """Raises UserError for an attention kernel that is not transformers' own: "owner/name" is code on the hub."""
    known = sorted(name for name in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()) if name.isidentifier())
    if asked and asked not in known:
        raise UserError(f"--attn_implementation {asked}: choose from {', '.join(known)}")
    for part in (config, config.get_text_config()):
        if not asked and part._attn_implementation and part._attn_implementation not in known:
            raise UserError(
                f"{flag}: {folder}/config.json asks for the attention kernel {part._attn_implementation!r}, which is "
                "code of others; take that out, or give --attn_implementation sdpa"
            )


@contextlib.contextmanager
def _loading(folder: Path, flag: str, kernel: str | None = None) -> Iterator[None]:
    """What transformers has against a folder, or against this attention kernel, becomes a UserError."""
    try:
        with quiet_transformers():
            yield
    except (*DAMAGED, TypeError, AttributeError) as error:
        if kernel and isinstance(error, ImportError):
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--attn_implementation {kernel}: {reason} Install that, or leave the flag out") from error
        raise UserError(f"{flag}: cannot load the model in {folder}: {reason_of(error)}") from error


def attention_cap(config: PretrainedConfig) -> float | None:
    """The bound that a model's attention scores are bent below (Gemma 2), if there is one."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def _settle_kernel(asked: str | None, config: PretrainedConfig, what: str, say: Callable[[str], None]) -> str | None:
    """The attention kernel to load a model with; None: transformers' choice. Its sdpa kernel leaves caps out.

    transformers hands the cap on to flash attention, whose package has to know it.
    """
    cap = attention_cap(config)
    if not cap or asked not in (None, "sdpa"):
        return asked
    if asked:
        say(f"{what}: --attn_implementation sdpa leaves out the model's cap of attention scores, {cap:g}; eager has it")
        return asked
    say(f"{what}: loaded with --attn_implementation eager, since sdpa leaves out its cap of attention scores, {cap:g}")
    return "eager"


def from_folder(
    auto_class: type, folder: Path, dtype: torch.dtype, device: torch.device, attn_implementation: str | None,
    flag: str, say: Callable[[str], None] = print,
) -> PreTrainedModel:  # fmt: skip
    """`auto_class.from_pretrained`, straight into `dtype`; refuses weights that are missing or not finite."""
    options = {}
    if device.type == "cuda":
        options["device_map"] = {"": device}
    with _loading(folder, flag):
        config = without_dropout(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    _check_kernel(attn_implementation, config, folder, flag)
    if kernel := _settle_kernel(attn_implementation, config, f"{flag} {folder}", say):
        options["attn_implementation"] = kernel
    with _loading(folder, flag, attn_implementation):
        model, report = auto_class.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    if report["mismatched_keys"]:
        name, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"{flag}: {folder} holds {name} in shape {list(stored)}, and its config.json says {list(wanted)}; copy the "
            "folder again"
        )
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
    """The config, its parts too, with dropout probabilities at 0: rollout and update must give the same log-probs."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif isinstance(value, PretrainedConfig):
            without_dropout(value)
    return config


def enable_checkpointing(model: PreTrainedModel, kept: int = 0) -> None:
    """Recompute activations in the backward pass. The non-reentrant kind, which needs no inputs with gradients.

    kept: this many of the last layers keep theirs. They are the first that the backward pass frees.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"--gradient_checkpoint: {type(model).__name__} does not support it; leave it out")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers_of(model)[::-1][:kept]:
        layer.gradient_checkpointing = False


def training_mode(model: nn.Module) -> None:
    """Leaves a model in eval mode, but for modules that checkpoint activations, which they do in training mode alone.

    So a forward of the update gives what the forwards of rollout and scoring give: dropout is off, and routers that
    draw their experts in training mode (PhiMoE) do not.
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
    """The row length above which rotary frequencies change for every row of the batch; None where they never do.

    LongRoPE (Phi-3 128k) and dynamic scaling do this; dynamic scaling without a length in its config at the window.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]  # some have one for each layer type
    changing = [rope for rope in kinds if re.search("dynamic|longrope", str(rope.get("rope_type")))]
    return min(filter(None, (rope.get("original_max_position_embeddings") for rope in changing)), default=None)


def check_window(model: nn.Module, max_tokens: int, flag: str) -> None:
    """Raises UserError when `max_tokens` of `flag` are more than the positions that the model was trained on."""
    window = window_of(model)
    if not window or max_tokens <= window:
        return
    if window == switching_position(model.config.get_text_config()):
        raise UserError(
            f"{flag} {max_tokens}: one row of more than {window} tokens would change the rotary positions of all rows "
            f"beside it (rope_type of the model's config); give at most {window}"
        )
    raise UserError(f"{flag} {max_tokens} is longer than the model's window: give at most {window}")


def fit_vocabulary(model: PreTrainedModel, tokenizer, what: str, say: Callable[[str], None]) -> None:
    """Grows the embedding for the tokenizer's moss_zh tags, and says so. UserError when other tokens lie beyond it."""
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
