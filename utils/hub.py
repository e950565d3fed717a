"""Tells hub ids from local paths, for tokenizers, models and data, and downloads them."""

import os
import re
from pathlib import Path

from utils.errors import UserError
from utils.watchdog import downloading

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_BESIDE_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "onnx/*", "original/*"]
downloaded: dict[tuple[str, str], Path | str] = {}  # (hub id, what of it) -> its folder or commit
_DATA_SUFFIXES = {
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".txt",
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".model",
    ".gguf",
    ".safetensors",
    ".bin",
    ".pt",
}


def is_hub_id(path: str) -> bool:
    """Whether `path` is a hub id `owner/name` rather than a local path, which must not reach the network.

    Not so: an existing path, a name with a file suffix, and a name whose first part is a local folder.
    """
    path = str(path)
    if os.path.exists(path) or "/" not in path or not _HUB_ID.fullmatch(path):
        return False
    return Path(path).suffix not in _DATA_SUFFIXES and not os.path.exists(path.split("/")[0])


def public_name(path: str) -> str:
    """Returns a hub id as it is, also one of data with a configuration and split; of other paths the last part.

    That is the name of the run where the last part is one that every run writes: `sft (final)` of outputs/sft/final.
    """
    if is_hub_id(path.split("@")[0].split(":")[0]) and "://" not in path:
        return path
    *folders, name = os.path.normpath(path).split(os.sep)
    return f"{folders[-1]} ({name})" if folders and folders[-1] and name.startswith(("best", "final")) else name


def check_target(target: str, flag: str) -> None:
    """Raises UserError if `target` is no id to upload to, or the hub is switched off. No network."""
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if target.count("/") != 1:
            raise HFValidationError("it is not OWNER/NAME")
        validate_repo_id(target)
    except HFValidationError as error:
        raise UserError(f"{flag} {target}: {error}; give the id of a model on the hub, as me/my-model") from None
    if constants.HF_HUB_OFFLINE:
        later = "train without it, and upload final/ later with python -m utils.push_to_hub"
        raise UserError(f"{flag} {target}: HF_HUB_OFFLINE=1 forbids the network; unset it, or {later}")


def download(name: str, flag: str, **patterns: list[str]) -> Path:
    """Returns the local folder of a hub id's files (`allow_patterns`, `ignore_patterns`). Raises UserError."""
    if folder := downloaded.get(key := (name, repr(patterns))):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with downloading():
            downloaded[key] = Path(snapshot_download(name, **patterns))
        return downloaded[key]
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"{flag}: cannot download {name}: {reason}; check the name, or download it first") from error


def download_model(name: str, flag: str) -> Path:
    """Returns the local folder of a hub id's model: safetensors if it has them, else `.bin`. Raises UserError."""
    folder = download(name, flag, ignore_patterns=_BESIDE_WEIGHTS)
    if not list(folder.glob("*.safetensors")):
        folder = download(name, flag, allow_patterns=["*.json", "*.bin"])
    return folder


def data_revision(name: str, config: str | None = None) -> str:
    """Returns the commit of the hub data set that `datasets` loads. Raises OSError or ValueError."""
    if commit := downloaded.get(key := (name, f"data {config}" if config else "data")):
        return commit
    import datasets

    try:
        with downloading():
            downloaded[key] = str(datasets.load_dataset_builder(name, config).hash)
        return downloaded[key]
    except (RuntimeError, datasets.exceptions.DatasetsError) as error:  # RuntimeError: it needs code of its own
        raise OSError(str(error)) from error
