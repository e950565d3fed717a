"""Writes checkpoints: `checkpoints/step_N/` holds all that a resumed run needs to continue exactly.

Files: `state.json` (the run's own numbers and flags), `<engine>-rank<r>.safetensors`, `random-rank<r>.json`, and
`manifest.json` with size and SHA-256 of the others. The folder gets its name once all files are on the disk.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from utils.distributed import gather_objects, is_main, rank
from utils.engine.average import WeightAverage
from utils.engine.engine import TrainEngine
from utils.engine.memory import page_locked
from utils.errors import Say, UserError
from utils.files import json_text, remove, replace, sync
from utils.run.index import CHECKPOINT, LINES, MANIFEST, read_index, record, remove_partials, write_index
from utils.run.own_files import carry_over, files_in, foreign_files, remove_own
from utils.run.random_state import random_state
from utils.run.state_file import Files, file_pieces, side_stream, write_files

PIECE = 1 << 26  # bytes of a rank's buffer: 64 MB, a power of two because PyTorch rounds pinned memory up to one
Engines = dict[str, TrainEngine | WeightAverage]


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
    read: threading.Event = field(default_factory=threading.Event)  # set once the engines may change
    share: Future[Share] | None = None

    @property
    def partial(self) -> str:
        """The folder's name until the checkpoint is complete."""
        return f"{self.target}.partial"

    def wait_until_read(self) -> None:
        """Waits until this rank's tensors have been read, or could not be."""
        started = time.perf_counter()
        self.read.wait()
        self.waited += time.perf_counter() - started


class CheckpointWriter:
    """Writes checkpoints to a folder, and removes the run's older ones but for `keep`. Every method is collective.

    A thread of each rank writes that rank's files, piece by piece from the live tensors. An engine that is about to
    change them waits until they have been read; in a PPO run, rollout and scoring come first. Only main threads
    communicate: once all ranks have written their files, the next `finish` or `save` names the checkpoint.
    """

    def __init__(self, folder: str, engines: Engines, keep: int):
        self._folder, self._engines, self._keep = folder, engines, keep
        self._writing: Writing | None = None
        self._buffer = page_locked(PIECE)  # kept: made later, it would split free blocks of the heap

    def save(self, state: dict, say: Say, background: bool = False) -> None:
        """Writes `folder`/step_N, after the previous checkpoint is complete. Prints a failure; older ones stay intact.

        state: JSON, with "step". background: return while it is being written.
        """
        self.finish()
        started = time.perf_counter()
        tensors = {name: engine.state_tensors() for name, engine in self._engines.items()}
        step, own = state["step"], sum(x.nbytes for named in tensors.values() for x in named.values())
        writing = Writing(step, os.path.join(self._folder, f"step_{step}"), sum(gather_objects(own)), say)
        if problem := first_problem(_problem(_prepare, writing) if is_main() else None):
            self._report_failure(writing, problem)
            return
        named = {f"{name}-rank{rank()}.safetensors": held for name, held in tensors.items() if held}
        files: Files = {name: file_pieces(held, self._buffer) for name, held in named.items()}
        files[f"random-rank{rank()}.json"] = [json_text(random_state()).encode()]
        if is_main():
            files["state.json"] = [json_text(state).encode()]
        thread = ThreadPoolExecutor(1, "checkpoint")
        writing.share = thread.submit(_write_share, writing.partial, files, side_stream(), writing.read, started)
        thread.shutdown(wait=False)  # the thread ends when the files are written
        for engine in self._engines.values():
            engine.before_change = writing.wait_until_read
        self._writing, writing.waited = writing, time.perf_counter() - started
        if not background:
            self.finish()

    def finish(self, wait: bool = True) -> None:
        """Completes the checkpoint that is being written. wait: if False, return at once while a rank still writes."""
        started, writing = time.perf_counter(), self._writing
        if writing and (wait or all(gather_objects(writing.share.done()))):
            self._writing = None
            self._complete(writing, writing.share.result(), started)

    def _complete(self, writing: Writing, share: Share, started: float) -> None:
        """Names the checkpoint once all ranks' shares are written, and prints times. started: of the wait for it."""
        shares, waits = zip(*gather_objects((share, writing.waited)), strict=True)
        problem = next((share.problem for share in shares if share.problem), None)
        if not problem:
            manifest = {name: entry for share in shares for name, entry in share.entries.items()}
            problem = first_problem(_problem(_commit, writing, manifest, self._keep) if is_main() else None)
        if problem:
            self._report_failure(writing, problem)
            return
        took, waited = max(share.seconds for share in shares), max(waits) + time.perf_counter() - started
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


def _write_share(
    partial: str, files: Files, stream: torch.cuda.Stream | None, read: threading.Event, started: float
) -> Share:
    """Writes this rank's files, in a thread of its own, and waits until they are on the disk.

    stream: of the copies from the GPU. read: set once all content has been read, or a failure has ended that.
    """
    entries: dict[str, dict] = {}
    try:
        torch.cuda.set_stream(stream)  # of this thread; None changes nothing
        problem = _problem(lambda: entries.update(write_files(partial, files, read.set)))
    except Exception as error:  # noqa: BLE001 - such as CUDA's: all ranks go on together, without this checkpoint
        problem = f"{type(error).__name__}: {error}"
    finally:
        read.set()
    if problem:  # frees space for the metrics of the steps until `finish`
        for name in files:
            _problem(remove, os.path.join(partial, name))
    return Share(entries, problem, time.perf_counter() - started)


def _commit(writing: Writing, manifest: dict, keep: int) -> None:
    """Writes the manifest, gives the folder its name, and removes the run's checkpoints but the newest `keep`."""
    write_files(writing.partial, {MANIFEST: [json_text(manifest).encode()]})
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
    """Writes the tensors of dataclasses to a file, for inspection. Returns why it failed, else None."""
    columns = {f.name: getattr(batch, f.name) for batch in batches for f in fields(batch)}
    tensors = {name: x.clone().contiguous() for name, x in columns.items() if isinstance(x, torch.Tensor)}

    def write() -> None:
        record(os.path.dirname(os.path.dirname(path)), "bad_batches", os.path.basename(path))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_file(tensors, path)

    return _problem(write)
