"""Writes checkpoints: `checkpoints/step_N/` holds all it takes to go on as if nothing had happened.

`state.json` (the run's own numbers and flags), `<engine>-rank<r>.safetensors`, `random-rank<r>.json`, and last
`manifest.json` with size and SHA-256 of the others. Only JSON and safetensors: nothing in there can run code. A
checkpoint is written beside its place, synced, then renamed, so that its folder appears whole or not at all.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import fields

from safetensors import SafetensorError
from safetensors.torch import save_file

from utils.distributed import gather_objects, is_main, rank
from utils.engine import TrainEngine
from utils.engine_state import num_bytes
from utils.random_state import random_state
from utils.run_folder import remove, write_json

MANIFEST = "manifest.json"
LINES = ("metrics.jsonl", "samples.jsonl")  # beside the folder of checkpoints
Engines = dict[str, TrainEngine]
Say = Callable[[str], None]


def save(folder: str, state: dict, engines: Engines, keep: int, say: Say) -> bool:
    """Writes `folder`/step_N and removes all but the newest `keep`. Collective. Memory: none on a CPU, else a copy.

    state: JSON, with "step". False, said, and everything older untouched, where the disk does not take it.
    """
    started = time.perf_counter()
    target = os.path.join(folder, f"step_{state['step']}")
    partial = f"{target}.partial"
    tensors = {name: engine.state_tensors() for name, engine in engines.items()}
    size = sum(gather_objects(sum(map(num_bytes, tensors.values()))))
    problem = first_problem(_problem(_make_room, partial, size) if is_main() else None)
    if not problem:
        files: dict[str, dict] = {}
        problem = _problem(_write_share, partial, state, tensors, files)
        shares = gather_objects((files, problem))
        problem = next((problem for _, problem in shares if problem), None)
    if not problem:
        manifest = {name: entry for files, _ in shares for name, entry in files.items()}
        problem = first_problem(_problem(_finish, partial, target, manifest, keep) if is_main() else None)
    if problem:
        if is_main():
            remove(partial)
        say(f"warning: the checkpoint of step {state['step']} was not saved: {problem}; older ones are as they were")
        return False
    say(f"checkpoint of step {state['step']}: {size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s")
    return True


def _problem(function: Callable, *arguments) -> str | None:
    """Runs it; what the disk had to say against it."""
    try:
        function(*arguments)
    except OSError as error:
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error.strerror or error)
    except SafetensorError as error:
        return str(error)
    return None


def first_problem(problem: str | None) -> str | None:
    """The first rank's problem that there is, on all ranks."""
    return next((problem for problem in gather_objects(problem) if problem), None)


def _make_room(partial: str, size: int) -> None:
    folder = os.path.dirname(partial)
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        if name.endswith(".partial"):
            remove(os.path.join(folder, name))
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"it takes {size / 1e6:.1f} MB, and {folder} has {free / 1e6:.1f} MB left: make room")
    os.makedirs(partial)


def _write_share(partial: str, state: dict, tensors: dict, files: dict[str, dict]) -> None:
    """This rank's files, synced; their manifest entries go into `files`."""
    names = []
    for engine, values in tensors.items():
        if values:
            names.append(f"{engine}-rank{rank()}.safetensors")
            save_file(values, os.path.join(partial, names[-1]))
    names.append(f"random-rank{rank()}.json")
    write_json(os.path.join(partial, names[-1]), random_state())
    if is_main():
        names.append("state.json")
        write_json(os.path.join(partial, names[-1]), state)
    for name in names:
        path = os.path.join(partial, name)
        _sync(path)
        files[name] = {"bytes": os.path.getsize(path), "sha256": sha256(path)}


def _finish(partial: str, target: str, manifest: dict, keep: int) -> None:
    write_json(os.path.join(partial, MANIFEST), manifest)
    _sync(os.path.join(partial, MANIFEST))
    _sync(partial)
    folder = os.path.dirname(target)
    for name in LINES:  # a checkpoint must not be ahead of what the run has written
        if os.path.exists(path := os.path.join(os.path.dirname(folder), name)):
            _sync(path)
    remove(target)
    os.replace(partial, target)
    _sync(folder)
    for step, path in all_checkpoints(folder)[keep:]:
        os.replace(path, f"{path}.partial")  # what a kill leaves of it is not taken for a checkpoint
        remove(os.path.join(folder, f"step_{step}.partial"))


def _sync(path: str) -> None:
    """Waits until a file's content or a folder's names are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def all_checkpoints(folder: str) -> list[tuple[int, str]]:
    """(step, path) of every checkpoint, newest first."""
    if not os.path.isdir(folder):
        return []
    matches = [re.fullmatch(r"step_(\d+)", name) for name in os.listdir(folder)]
    return sorted(((int(m[1]), os.path.join(folder, m[0])) for m in matches if m), reverse=True)


def save_batches(path: str, batches: tuple) -> str | None:
    """Writes the tensors of dataclasses to one file, for a person to look at; returns what the disk had against it."""
    tensors = {f.name: getattr(batch, f.name).contiguous() for batch in batches for f in fields(batch)}

    def write() -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_file({name: x.clone() for name, x in tensors.items()}, path)

    return _problem(write)
