"""Output folder of a command, complete or absent, and the safetensors files in it."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from utils.errors import UserError
from utils.files import atomic_folder, check_writable, existing_parent, write_json


def check_new_folder(path: str, flag: str, sources: dict[str, str]) -> None:
    """Raises UserError if `path` exists, is one of `sources` (flag -> path) or cannot be created. Writes nothing."""
    for other, source in sources.items():
        if os.path.realpath(source) == os.path.realpath(path):
            raise UserError(f"{flag} {path} is the folder of {other}; use a new one")
    if os.path.lexists(path):
        raise UserError(f"{flag} {path} exists already; use a new folder, or remove it first")
    check_writable(path, flag)


@contextlib.contextmanager
def new_folder(path: str, flag: str, size: int = 0) -> Iterator[Path]:
    """Yields a folder that gets the name `path` if the block succeeds. UserError without `size` bytes of room."""
    free = shutil.disk_usage(existing_parent(path)).free
    if free < size:
        needed = f"{flag} {path} needs {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free on its disk"
        raise UserError(f"{needed}; free disk space, or use a folder on another disk")
    with atomic_folder(path, flag) as partial:
        yield Path(partial)
        if os.path.lexists(path):
            raise UserError(f"{flag} {path} was created by another process meanwhile; use another folder")


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> None:
    """Writes tensors, in order, to safetensors files of at most `max_bytes` of data, unless one tensor is larger."""
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
        write_json(str(folder / "model.safetensors.index.json"), index)
    for number, name in enumerate(names, start=1):
        os.rename(folder / f"model-{number:05d}.safetensors", folder / name)
