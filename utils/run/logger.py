"""Where a run writes what happens: metrics.jsonl, TensorBoard, other trackers, samples.jsonl, the terminal."""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from utils.device import synchronize
from utils.distributed import is_main
from utils.errors import UserError
from utils.run.folder import cut_lines

PROGRESS = {"score_mean": "score", "kl_ref": "kl", "response_length": "length", "loss": "loss", "accuracy": "accuracy"}


class Stopwatch:
    """Seconds of the stages of a step. Each lap waits for the GPU, so that a stage's work counts as its own."""

    def __init__(self, on_lap: Callable[[str], None] = lambda stage: None):
        """on_lap: told of each stage that has ended."""
        self._on_lap = on_lap
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage: the time since the last lap is its own."""
        synchronize()
        now = time.perf_counter()
        self._seconds[f"seconds_{stage}"] = now - self._last
        self._last = now
        self._on_lap(stage)

    def metrics(self, samples: int, tokens: int) -> dict[str, float]:
        """Seconds a stage; samples and response tokens, of all ranks, a second of all stages together."""
        total = sum(self._seconds.values())
        return self._seconds | {"samples_per_second": samples / total, "tokens_per_second": tokens / total}


class RunLogger:
    """All output of a run. Rank 0 writes; on other ranks every method does nothing.

    folder: the run's folder, already made. logdir: TensorBoard's (None: folder/tensorboard). report_to: comma-separated
    names of accelerate's trackers besides TensorBoard ("wandb,swanlab"), "none" for none. config: what trackers store.
    step: how many steps an earlier part of the run has made; what TensorBoard has of later ones is hidden.
    """

    def __init__(self, folder: str, logdir: str | None, report_to: str, config: dict, total_steps: int, step: int = 0):
        self.folder = folder
        self.trackers = []
        if not is_main():
            return
        self.logdir = logdir or os.path.join(folder, "tensorboard")
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        self.board = self._board(step)
        self.trackers = [_tracker(name, folder, config) for name in tracker_names(report_to)]
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One step's numbers: a line of metrics.jsonl, scalars, the progress bar. A NaN is written as null."""
        if not is_main():
            return
        clean = {key: (value if math.isfinite(value) else None) for key, value in values.items()}
        with self._disk():
            _append(os.path.join(self.folder, "metrics.jsonl"), {"step": step, **clean})
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
        for tracker in self.trackers:
            tracker.log(values, step=step)
        shown = {PROGRESS[key]: f"{value:.3g}" for key, value in values.items() if key in PROGRESS}
        if shown:
            self.bar.set_postfix(shown, refresh=False)

    def advance(self) -> None:
        """One step of the progress bar is done."""
        if is_main():
            self.bar.update()

    def samples(self, step: int, rows: list[dict]) -> None:
        """Texts of this step: lines of samples.jsonl, and TensorBoard's text tab."""
        if not is_main():
            return
        text = "\n\n---\n\n".join("\n\n".join(f"**{key}**: {value}" for key, value in row.items()) for row in rows)
        with self._disk():
            _append(os.path.join(self.folder, "samples.jsonl"), *({"step": step, **row} for row in rows))
            self.board.add_text("samples", text, step)

    def rewind(self, step: int) -> None:
        """What was written of steps after this one goes: they will be made anew."""
        if not is_main():
            return
        with self._disk():
            for name in ("metrics.jsonl", "samples.jsonl"):
                cut_lines(os.path.join(self.folder, name), step)
            self.board.close()
        self.board = self._board(step)
        self.bar.n = step

    def _board(self, step: int):
        from torch.utils.tensorboard import SummaryWriter

        with self._disk(f"--logdir {self.logdir}"):
            return SummaryWriter(self.logdir, purge_step=step + 1)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if is_main():
            self.bar.write(text)

    def close(self) -> None:
        """Flushes everything; call it at the end of a run."""
        if not is_main():
            return
        self.bar.close()
        with contextlib.suppress(OSError):  # a full disk has been told of, and this must not hide the words
            self.board.close()
        threading.excepthook = self._hook
        for tracker in self.trackers:
            tracker.finish()

    def _thread_failed(self, arguments) -> None:
        """TensorBoard's thread passes an error of the disk to the next call, which prints it in one line.

        Its stack would come besides, with frames of ours in it when that call is the faster one: they share the error.
        """
        board = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (board and isinstance(arguments.exc_value, OSError)):
            self._hook(arguments)

    @contextlib.contextmanager
    def _disk(self, place: str = "") -> Iterator[None]:
        """What the disk has against writing, to the run's folder or `place`, becomes a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{place or self.folder} cannot be written: {error.strerror}; make room and give the same command "
                "again, which goes on from the last checkpoint"
            ) from None


def _append(path: str, *rows: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def tracker_names(report_to: str) -> list[str]:
    """The names in the flag's comma-separated list; none for "none"."""
    return [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]


def _tracker(name: str, folder: str, config: dict):
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers ask accelerate which process they are in
    kind = LOGGER_TYPE_TO_CLASS[name]
    run_name = os.path.basename(os.path.abspath(folder))
    tracker = kind(run_name, folder) if kind.requires_logging_directory else kind(run_name)
    tracker.start()
    tracker.store_init_configuration({key: value for key, value in config.items() if value is not None})
    return tracker
