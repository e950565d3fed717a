"""Writes checkpoints: `checkpoints/step_N/` holds all that a resumed run needs to continue exactly.

Files: `state.json` (the run's own numbers and flags), `<engine>-rank<r>.safetensors`, `random-rank<r>.json`, and
`manifest.json` with size and SHA-256 of the others. The folder gets its name once all files are on the disk.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import repeat
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from utils.distributed import gather_objects, is_main, rank
from utils.engine.engine import TrainEngine
from utils.engine.memory import fits_on_host
from utils.errors import Say, UserError
from utils.files import json_text, remove, replace, sync
from utils.run.index import CHECKPOINT, LINES, MANIFEST, read_index, record, remove_partials, write_index
from utils.run.own_files import carry_over, files_in, foreign_files, remove_own
from utils.run.random_state import random_state
from utils.run.state_file import PIECE, file_pieces, new_buffer, write_file

Engines = dict[str, TrainEngine]
Files = dict[str, Iterable[bytes | torch.Tensor]]  # name -> content


class Share(NamedTuple):
    """The result of writing one rank's files of a checkpoint."""

    entries: dict[str, dict]  # of the manifest
    problem: str | None  # why the files could not be written
    seconds: float  # from the start of `save` until the files were on the disk


@dataclass
class Writing:
    """A checkpoint that is being written. size: bytes of all ranks' tensors; waited: seconds of the main thread."""

    step: int
    target: str
    size: int
    say: Say
    waited: float = 0.0
    share: Future[Share] | None = None

    @property
    def partial(self) -> str:
        """The folder's name until the checkpoint is complete."""
        return f"{self.target}.partial"


class CheckpointWriter:
    """Writes checkpoints to a folder, and removes the run's older ones but for `keep`. Every method is collective.

    In the background, a thread of each rank writes that rank's files from a copy. Only main threads communicate: once
    all ranks have written their files, the next `finish` or `save` gives the checkpoint its final name.
    """

    def __init__(self, folder: str, engines: Engines, keep: int):
        self._folder, self._engines, self._keep = folder, engines, keep
        self._writing: Writing | None = None
        self._copies: list[torch.Tensor] = []

    def save(self, state: dict, say: Say, background: bool = False) -> None:
        """Writes `folder`/step_N, after the previous checkpoint is complete. Prints a failure; older ones stay intact.

        state: JSON, with "step". background: return once host memory holds a copy, if all ranks have room for it.
        """
        self.finish()
        started = time.perf_counter()
        tensors = {name: engine.state_tensors() for name, engine in self._engines.items()}
        own = sum(x.nbytes for named in tensors.values() for x in named.values())
        fits = background and fits_on_host(own - PIECE * len(self._copies))
        shares = gather_objects((own, fits))
        step, size = state["step"], sum(own for own, _ in shares)
        writing = Writing(step, os.path.join(self._folder, f"step_{step}"), size, say)
        if problem := first_problem(_problem(_prepare, writing) if is_main() else None):
            self._report_failure(writing, problem)
            return
        files, copied = self._files(tensors, all(fits for _, fits in shares))
        files[f"random-rank{rank()}.json"] = [json_text(random_state()).encode()]
        if is_main():
            files["state.json"] = [json_text(state).encode()]
        if not all(gather_objects(copied)):
            self._complete(writing, _write_share(writing.partial, files, started), started)
            return
        thread = ThreadPoolExecutor(1, "checkpoint")
        writing.share = thread.submit(_write_share, writing.partial, files, started)
        thread.shutdown(wait=False)  # the thread ends when the files are written
        self._writing, writing.waited = writing, time.perf_counter() - started

    def finish(self, wait: bool = True) -> None:
        """Completes the checkpoint that is being written. wait: if False, return at once while a rank still writes."""
        started, writing = time.perf_counter(), self._writing
        if writing and (wait or all(gather_objects(writing.share.done()))):
            self._writing = None
            self._complete(writing, writing.share.result(), started)

    def _files(self, tensors: dict[str, dict[str, torch.Tensor]], copy: bool) -> tuple[Files, bool]:
        """Returns the contents of the engines' files, and whether they are copies, made if `copy`."""
        named = {f"{engine}-rank{rank()}.safetensors": values for engine, values in tensors.items() if values}
        if copy:
            buffers = self._buffers()
            with contextlib.suppress(RuntimeError):  # a system may limit pinned memory below what is free
                return {name: list(file_pieces(values, buffers)) for name, values in named.items()}, True
            self._copies.clear()
        buffers = repeat(new_buffer())
        return {name: file_pieces(values, buffers) for name, values in named.items()}, False

    def _buffers(self) -> Iterator[torch.Tensor]:
        """Yields the buffers of the previous checkpoint, then new ones."""
        yield from list(self._copies)
        while True:
            self._copies.append(new_buffer())
            yield self._copies[-1]

    def _complete(self, writing: Writing, share: Share, started: float) -> None:
        """Names the checkpoint once all ranks' shares are written, and prints times. started: of the wait for it."""
        self._copies = [buffer for buffer in self._copies if buffer.is_pinned()]  # kept, since pinning is slow
        shares = gather_objects(share)
        problem = next((share.problem for share in shares if share.problem), None)
        if not problem:
            manifest = {name: entry for share in shares for name, entry in share.entries.items()}
            problem = first_problem(_problem(_commit, writing, manifest, self._keep) if is_main() else None)
        if problem:
            self._report_failure(writing, problem)
            return
        took, waited = max(share.seconds for share in shares), writing.waited + time.perf_counter() - started
        writing.say(
            f"checkpoint of step {writing.step}: {writing.size / 1e6:.1f} MB in {took:.1f} s; the run waited "
            f"{waited:.1f} s for it"
        )

    def _report_failure(self, writing: Writing, problem: str) -> None:
        if is_main():
            _problem(remove_partials, self._folder)
        writing.say(f"warning: the checkpoint of step {writing.step} was not saved: {problem}; older ones are intact")


def _problem(function: Callable, *arguments) -> str | None:
    """Calls a function; returns the error of the disk that it raises, None if there is none."""
    try:
        function(*arguments)
    except OSError as error:
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error.strerror or error)
    except (SafetensorError, UserError) as error:
        return str(error)
    return None


def first_problem(problem: str | None) -> str | None:
    """Returns, on all ranks, the problem of the first rank that has one. Collective."""
    return next((problem for problem in gather_objects(problem) if problem), None)


def _prepare(writing: Writing) -> None:
    """Lists and creates a checkpoint's folder, after removing incomplete ones. Raises OSError if there is no room."""
    folder, size = os.path.dirname(writing.target), writing.size
    os.makedirs(folder, exist_ok=True)
    index = remove_partials(folder)
    for path, taken in ((writing.target, _is_checkpoint), (writing.partial, os.path.lexists)):
        if writing.step not in index.checkpoints and taken(path):
            raise OSError(f"{path} was not written by this run; move it")
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"it needs {size / 1e6:.1f} MB, but {folder} has {free / 1e6:.1f} MB free; free disk space")
    index.checkpoints = sorted({*index.checkpoints, writing.step})
    write_index(os.path.dirname(folder), index)
    os.makedirs(writing.partial)


def _is_checkpoint(path: str) -> bool:
    """Whether there is more at a path than a folder of files that no checkpoint has, such as a user's notes."""
    own = set(files_in(path)) - set(foreign_files(path, CHECKPOINT))
    return bool(own) or os.path.islink(path) or os.path.isfile(path)


def _write_share(partial: str, files: Files, started: float) -> Share:
    """Writes this rank's files and waits until they are on the disk."""
    entries: dict[str, dict] = {}

    def write() -> None:
        for name, pieces in files.items():
            entries[name] = write_file(os.path.join(partial, name), pieces)

    problem = _problem(write)
    if problem:  # frees space for the metrics of the steps until `finish`
        for name in files:
            _problem(remove, os.path.join(partial, name))
    return Share(entries, problem, time.perf_counter() - started)


def _commit(writing: Writing, manifest: dict, keep: int) -> None:
    """Writes the manifest, gives the folder its name, and removes the run's checkpoints but the newest `keep`."""
    write_file(os.path.join(writing.partial, MANIFEST), [json_text(manifest).encode()])
    folder = os.path.dirname(writing.target)
    run = os.path.dirname(folder)
    for name in LINES:  # after a power cut, a checkpoint must not be ahead of the run's metrics
        if os.path.exists(path := os.path.join(run, name)):
            sync(path)
    carry_over(writing.target, writing.partial, CHECKPOINT)
    replace(writing.partial, writing.target)
    index = read_index(run)
    index.last_checkpoint = writing.step
    for step, path in all_checkpoints(folder)[keep:]:
        remove_own(path, CHECKPOINT)
        index.checkpoints.remove(step)
    with contextlib.suppress(UserError):  # no room for it: the next checkpoint's will do
        write_index(run, index)


def all_checkpoints(folder: str) -> list[tuple[int, str]]:
    """Returns (step, path) of every checkpoint in a folder that the run wrote, newest first."""
    steps = sorted(read_index(os.path.dirname(folder)).checkpoints, reverse=True)
    paths = [(step, os.path.join(folder, f"step_{step}")) for step in steps]
    return [(step, path) for step, path in paths if os.path.isdir(path) and _is_checkpoint(path)]


def save_batches(path: str, batches: tuple) -> str | None:
    """Writes the tensors of dataclasses to one file, for inspection. Returns the reason if that fails, else None."""
    tensors = {f.name: getattr(batch, f.name).clone().contiguous() for batch in batches for f in fields(batch)}

    def write() -> None:
        record(os.path.dirname(os.path.dirname(path)), "bad_batches", os.path.basename(path))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_file(tensors, path)

    return _problem(write)
