"""Folders on disk: a run's own, and files and folders that appear whole or not at all."""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import IO

from safetensors import SafetensorError

from utils.distributed import barrier, is_main
from utils.errors import UserError

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "datasets",
    "sentencepiece",
    "tensorboard",
    "safetensors",
)
RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "best", "final", "tensorboard")
RUN_FILES += ("checkpoints", "bad_batches")


def holds_run(path: str) -> bool:
    """Whether a run has written there."""
    return any(os.path.lexists(os.path.join(path, name)) for name in RUN_FILES)


def check_inputs(path: str, inputs: list[str | None]) -> None:
    """Raises UserError when --model_save_path holds one of `inputs`, models and data that the run reads."""
    real = os.path.realpath(path)
    for source in inputs:
        if source and os.path.exists(source) and os.path.commonpath([real, os.path.realpath(source)]) == real:
            raise UserError(f"--model_save_path {path} would overwrite {source}, which this run reads: choose another")


def check_writable(path: str, flag: str) -> None:
    """Raises UserError when no folder can be made at the `path` of `flag`. Changes nothing."""
    parent = os.path.abspath(path)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written: {parent} is not a writable folder; choose another place")


def check_output_file(path: str, flag: str) -> None:
    """Raises UserError when no file can be written at the `path` of `flag`. Changes nothing."""
    if _is_special(path):
        return
    check_writable(os.path.dirname(os.path.abspath(path)), flag)
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a folder: give the name of a file")


def _is_special(path: str) -> bool:
    """Whether something is there, or where a link points to, that is no file and no folder: a device, a pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def prepare_run_folder(path: str, config, step: int = 0) -> None:
    """Makes the folder and writes config.json. Rank 0 writes, all ranks wait.

    config: a dataclass of flags. step: where the run goes on; all that an earlier one wrote after it goes (0: all).
    """
    barrier()
    if is_main():
        description = run_description(config) | {"resumed_from_step": step}
        try:
            os.makedirs(path, exist_ok=True)
            for name in RUN_FILES:
                file = os.path.join(path, name)
                if not step or name == "final":
                    remove(file)
                elif name.endswith(".jsonl"):
                    cut_lines(file, step)
            if step:
                drop_checkpoints(os.path.join(path, "checkpoints"), step)
            write_json(os.path.join(path, "config.json"), description)
        except OSError as error:
            raise UserError(f"--model_save_path {path} cannot be written: {error.strerror}") from None
    barrier()


def drop_checkpoints(folder: str, step: int) -> None:
    """Removes what lies in a folder of checkpoints from after `step`, and what a kill left half-written."""
    for name in os.listdir(folder):
        number = name.removeprefix("step_")
        if not number.isdigit() or int(number) > step:
            remove(os.path.join(folder, name))


def cut_lines(path: str, step: int) -> None:
    """Leaves the lines of a .jsonl file up to `step` (key "step"); later ones go, and one that a kill cut short."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file, open(f"{path}.partial", "wb") as kept:
        for line in file:
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:
                break
            kept.write(line)
    os.replace(f"{path}.partial", path)


def run_description(config) -> dict:
    """All flags, argv, versions, git commit and devices: what it takes to repeat a run."""
    import torch

    from utils.device import on_gpu

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu() else []
    return {
        **dataclasses.asdict(config),
        "argv": sys.argv,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "git_commit": _git_commit(),
        "devices": gpus or [f"{os.cpu_count()} CPU cores"],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _git_commit() -> str | None:
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__)).stdout.strip() or None


def write_json(path: str, content) -> None:
    """Writes beside and renames, so that a reader never sees half a file. Makes the folder where there is none."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        _dump(content, file)
    os.replace(f"{path}.partial", path)


def write_result(path: str, flag: str, content) -> None:
    """The JSON file that the user asked for by `flag`, as `atomic_file` writes."""
    with atomic_file(path, flag) as file:
        _dump(content, file)


def _dump(content, file: IO[str]) -> None:
    json.dump(content, file, indent=2, ensure_ascii=False)
    file.write("\n")


@contextlib.contextmanager
def atomic_file(path: str, flag: str) -> Iterator[IO[str]]:
    """Yields a text file to write to beside `path`, which takes its place when the block ends well, else goes.

    A link stays one, and what it points to is replaced; a device or pipe is written to as it is. Call it on one rank. A
    write error becomes a UserError that names `flag` and the path.
    """
    try:
        if _is_special(path):
            with open(path, "w", encoding="utf-8") as file:
                yield file
        else:
            with _file_beside(os.path.realpath(path), flag) as file:
                yield file
    except OSError as error:
        problem = error.strerror or error
        raise UserError(f"{flag} {path} cannot be written: {problem}; choose another place, or free the disk") from None


@contextlib.contextmanager
def _file_beside(path: str, flag: str) -> Iterator[IO[str]]:
    folder, partial = os.path.dirname(path), f"{path}.partial"
    check_writable(folder, flag)
    new = missing_folders(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        remove(partial)
        for made in new:
            with contextlib.suppress(OSError):  # it holds something now
                os.rmdir(made)


def missing_folders(path: str) -> list[str]:
    """The folders that `os.makedirs` would make, the innermost first."""
    missing = []
    while not os.path.exists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """Yields a new folder beside `path` that takes its place when the block ends well, and goes when it does not.

    Call it on one rank. A write error becomes a UserError that names the folder.
    """
    partial = f"{os.path.abspath(path)}.partial"
    remove(partial)
    try:
        os.makedirs(partial)
        yield partial
        remove(path)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        remove(partial)


def remove(path: str) -> None:
    """Removes a file, a link or a whole folder, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)
