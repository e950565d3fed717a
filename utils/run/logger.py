"""Output of a run: metrics.jsonl, samples.jsonl, TensorBoard, other trackers, what is printed."""

import contextlib
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from utils.device import peak_memory, synchronize
from utils.distributed import is_main
from utils.files import disk_errors
from utils.html import markdown
from utils.notices import update
from utils.run.display import Display
from utils.run.folder import cut_lines
from utils.run.index import LINES, record
from utils.run.metric_groups import grouped
from utils.run.trackers import Trackers
from utils.terminal import printable
from utils.watchdog import report_progress


class Stopwatch:
    """Measures the seconds of each stage of a step. Each lap synchronises with the GPU."""

    def __init__(self, on_lap: Callable[[str], None] = lambda stage: None):
        """on_lap: called with the name of each stage that ends."""
        self._on_lap = on_lap
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage, which lasted since the previous lap. A stage may have several laps."""
        synchronize()
        now, name = time.perf_counter(), f"seconds_{stage}"
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now
        self._on_lap(stage)

    def metrics(self, samples: int, tokens: int) -> dict[str, float]:
        """Returns seconds per stage; samples and response tokens of all ranks per second of all stages together."""
        total = sum(self._seconds.values())
        return self._seconds | {"samples_per_second": samples / total, "tokens_per_second": tokens / total}


class RunLogger:
    """Writes all output of a run on rank 0; on other ranks every method does nothing.

    folder: the run's existing folder. logdir: of TensorBoard (None: folder/tensorboard). step: steps already done;
    TensorBoard hides older values of later steps. every: steps between printed ones. trackers: of --report_to.
    """

    def __init__(
        self, folder: str, logdir: str | None, total_steps: int, step: int = 0, every: int = 1,
        trackers: Trackers | None = None,
    ):  # fmt: skip
        self.folder, self.trackers = folder, trackers
        if not is_main():
            return
        self.logdir = logdir or os.path.join(folder, "tensorboard")
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        self.board = self._board(step)
        self.display = Display(total_steps, step, every)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Writes a step's numbers and the peak memory to metrics.jsonl (NaN as null), TensorBoard and the trackers."""
        if not is_main():
            return
        values = values | {"memory_peak_gb": peak_memory() / 1e9}
        clean = {key: (value if math.isfinite(value) else None) for key, value in values.items()}
        with self._disk():
            _append(os.path.join(self.folder, "metrics.jsonl"), {"step": step, **clean})
            for key, value in values.items():
                self.board.add_scalar(grouped(key), value, step)
        if self.trackers:
            self.trackers.metrics(step, values)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Prints a step's numbers if it is its turn; later notices say them, too."""
        if is_main():
            update(step, values=values)
            self.display.step(step, values)

    def advance(self) -> None:
        """Advances the progress bar by one step."""
        if is_main():
            self.display.advance()

    def lap(self, stage: str) -> None:
        """Reports that a stage of the step is complete."""
        report_progress(stage)
        if is_main():
            self.display.phase(stage)

    def samples(self, step: int, rows: list[dict]) -> None:
        """Writes a step's texts to samples.jsonl, TensorBoard's text tab and the trackers."""
        if not is_main():
            return
        texts = ({key: markdown(str(value)).replace("\n", "<br>") for key, value in row.items()} for row in rows)
        parts = ("\n\n".join(f"**{key}**: {text}" for key, text in row.items()) for row in texts)
        with self._disk():
            _append(os.path.join(self.folder, "samples.jsonl"), *({"step": step, **row} for row in rows))
            self.board.add_text("samples", "\n\n---\n\n".join(parts), step)
        if self.trackers:
            self.trackers.samples(step, rows)

    def rewind(self, step: int) -> None:
        """Removes what was written of steps after this one, which will run again."""
        if not is_main():
            return
        with self._disk():
            for name in LINES:
                cut_lines(os.path.join(self.folder, name), step)
            self.board.close()
        self.board = self._board(step)
        self.display.rewind(step)

    def _board(self, step: int):
        from torch.utils.tensorboard import SummaryWriter

        ending = f".{secrets.token_hex(4)}"
        if os.path.realpath(self.logdir) == os.path.realpath(os.path.join(self.folder, "tensorboard")):
            record(self.folder, "tensorboard", f"events.out.tfevents.*{ending}")
        with self._disk(f"--logdir {self.logdir}"):
            return SummaryWriter(self.logdir, purge_step=step + 1, filename_suffix=ending)

    def say(self, text: str) -> None:
        """Prints a line."""
        if is_main():
            self.display.say(text)

    def close(self) -> None:
        """Flushes and closes all outputs."""
        if not is_main():
            return
        self.display.close()
        with contextlib.suppress(OSError):  # must not hide the error that ends the run
            self.board.close()
        threading.excepthook = self._hook
        if self.trackers:
            self.trackers.close()

    def _thread_failed(self, arguments) -> None:
        """Drops disk errors of TensorBoard's thread: the next call raises them again, and they are printed once."""
        board = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (board and isinstance(arguments.exc_value, OSError)):
            self._hook(arguments)

    def _disk(self, place: str = "") -> AbstractContextManager[None]:
        advice = "free disk space and repeat the same command, which resumes from the last checkpoint"
        return disk_errors(place or self.folder, advice)


def _append(path: str, *rows: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(printable(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
