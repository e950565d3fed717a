"""The folder that a command writes: it appears whole or not at all. And the safetensors files in it."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from utils.errors import UserError
from utils.files import check_writable, sync

_MARK = ".being-written"  # locked while its folder is; what a killed run leaves behind is not


def check_new_folder(path: str, flag: str, sources: dict[str, str]) -> None:
    """Raises UserError when `path` exists, is one of `sources` (flag -> path) or cannot be made. Changes nothing."""
    for other, source in sources.items():
        if os.path.realpath(source) == os.path.realpath(path):
            raise UserError(f"{flag} {path} is the folder of {other}: give a new one")
    if os.path.lexists(path):
        raise UserError(f"{flag} {path} exists already: give a new folder, or remove it first")
    check_writable(path, flag)


def check_space(path: str, flag: str, needed: int) -> None:
    """Raises UserError unless `needed` bytes are free where `path` is to be."""
    parent = os.path.abspath(path)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{flag} {path} needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free on its disk: free some, or "
            "give a folder on another disk"
        )


@contextlib.contextmanager
def new_folder(path: str, flag: str) -> Iterator[Path]:
    """Yields a folder beside `path` that becomes it when the block ends well, and goes when it does not.

    What an earlier, killed run has left is removed first. Raises UserError when the disk fails, or when another run is
    writing the same folder.
    """
    partial = Path(f"{os.path.abspath(path)}.partial")
    try:
        _remove_leftover(partial, flag)
        os.makedirs(partial)
        with open(partial / _MARK, "wb") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX)
            try:
                yield partial
                (partial / _MARK).unlink()
                for file in [*partial.iterdir(), partial]:
                    sync(file)
                if os.path.lexists(path):
                    raise UserError(f"{flag} {path} has appeared meanwhile: give another folder")
                os.rename(partial, path)
                sync(partial.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} {path} cannot be written ({reason}): free the disk, or give another folder") from error


def _remove_leftover(partial: Path, flag: str) -> None:
    if not os.path.lexists(partial):
        return
    if not (partial / _MARK).is_file():
        raise UserError(f"{flag}: {partial} is in the way, and no run of this command has left it: move it")
    with open(partial / _MARK, "rb") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{flag}: another run is writing {partial}: wait for it, or stop it") from None
        shutil.rmtree(partial)


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> None:
    """Writes tensors, in their order, to safetensors files of at most `max_bytes` of data (or of one larger tensor).

    One alone is `model.safetensors`; several get numbers and an index. One file's tensors are in memory at a time.
    """
    shard: dict[str, torch.Tensor] = {}
    shards: list[dict[str, int]] = []  # name of a tensor -> bytes

    def save() -> None:
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})
        save_file(shard, folder / f"model-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        shard.clear()

    for name, tensor in tqdm(tensors, unit=" tensors", disable=None):
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > max_bytes:
            save()
        shard[name] = tensor
    save()
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        size = sum(sum(sizes.values()) for sizes in shards)
        files = {tensor: name for sizes, name in zip(shards, names) for tensor in sizes}
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for number, name in enumerate(names, start=1):
        os.rename(folder / f"model-{number:05d}.safetensors", folder / name)
