"""Output of a run: metrics.jsonl, samples.jsonl, TensorBoard, other trackers, progress bar."""

import contextlib
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from tqdm import tqdm

from utils.device import synchronize
from utils.distributed import is_main
from utils.files import disk_errors
from utils.html import markdown
from utils.run.folder import cut_lines
from utils.run.index import LINES, record
from utils.terminal import printable

LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 20) -> str:
    """Returns a curve as text, from ▁ (lowest value) to █ (highest), of at most `width` values, evenly spaced."""
    every = -(-len(values) // width)
    shown, low, high = values[(len(values) - 1) % every :: every], min(values), max(values)
    return "".join(LEVELS[int((len(LEVELS) - 1) * (value - low) / ((high - low) or 1) + 0.5)] for value in shown)


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

    folder: the run's existing folder. logdir: of TensorBoard (None: folder/tensorboard). report_to: --report_to.
    config: flags for the trackers. step: steps already done; TensorBoard hides older values of later steps.
    """

    def __init__(self, folder: str, logdir: str | None, report_to: str, config: dict, total_steps: int, step: int = 0):
        self.folder = folder
        self.trackers = []
        self.curve: dict[int, float] = {}  # step -> score, or loss: what `_show` draws
        if not is_main():
            return
        self.logdir = logdir or os.path.join(folder, "tensorboard")
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        self.board = self._board(step)
        self.trackers = [_tracker(name, folder, config) for name in tracker_names(report_to)]
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)
        self._first, self._started = step, time.perf_counter()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Writes a step's numbers to metrics.jsonl (NaN as null), TensorBoard, the trackers and the progress bar."""
        if not is_main():
            return
        clean = {key: (value if math.isfinite(value) else None) for key, value in values.items()}
        with self._disk():
            _append(os.path.join(self.folder, "metrics.jsonl"), {"step": step, **clean})
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
        for tracker in self.trackers:
            tracker.log(values, step=step)
        self._show(step, values)

    def _show(self, step: int, values: dict[str, float]) -> None:
        """Prints a line per step of PPO; shows loss and accuracy of other stages in the progress bar. Adds a curve."""
        name = "score_mean" if "score_mean" in values else "loss"
        if not math.isfinite(values.get(name, math.nan)):
            return
        self.curve[step] = values[name]
        curve = sparkline(list(self.curve.values()))
        if name == "loss":
            shown = {key: f"{values[key]:.3g}" for key in ("loss", "accuracy") if key in values}
            self.bar.set_postfix(shown | {"curve": curve}, refresh=False)
        else:
            elapsed = time.perf_counter() - self._started
            left = elapsed / max(1, step - self._first) * (self.bar.total - step)
            self.say(
                f"step {step}/{self.bar.total}: score {values[name]:.2f}, KL {values['kl_ref']:.2f}, length "
                f"{values['response_length']:.1f}, ended {values['eos_fraction']:.0%}, {left:.0f} s left {curve}"
            )

    def advance(self) -> None:
        """Advances the progress bar by one step."""
        if is_main():
            self.bar.update()

    def samples(self, step: int, rows: list[dict]) -> None:
        """Writes a step's texts to samples.jsonl and to TensorBoard's text tab."""
        if not is_main():
            return
        parts = ("\n\n".join(f"**{key}**: {markdown(str(value))}" for key, value in row.items()) for row in rows)
        with self._disk():
            _append(os.path.join(self.folder, "samples.jsonl"), *({"step": step, **row} for row in rows))
            self.board.add_text("samples", "\n\n---\n\n".join(parts), step)

    def rewind(self, step: int) -> None:
        """Removes what was written of steps after this one, which will run again."""
        if not is_main():
            return
        with self._disk():
            for name in LINES:
                cut_lines(os.path.join(self.folder, name), step)
            self.board.close()
        self.board = self._board(step)
        self.curve = {at: value for at, value in self.curve.items() if at <= step}
        self.bar.n = step

    def _board(self, step: int):
        from torch.utils.tensorboard import SummaryWriter

        ending = f".{secrets.token_hex(4)}"
        if os.path.realpath(self.logdir) == os.path.realpath(os.path.join(self.folder, "tensorboard")):
            record(self.folder, "tensorboard", f"events.out.tfevents.*{ending}")
        with self._disk(f"--logdir {self.logdir}"):
            return SummaryWriter(self.logdir, purge_step=step + 1, filename_suffix=ending)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if is_main():
            self.bar.write(text)

    def close(self) -> None:
        """Flushes and closes all outputs."""
        if not is_main():
            return
        self.bar.close()
        with contextlib.suppress(OSError):  # must not hide the error that ends the run
            self.board.close()
        threading.excepthook = self._hook
        for tracker in self.trackers:
            tracker.finish()

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


def tracker_names(report_to: str) -> list[str]:
    """Returns the names in the comma-separated value of --report_to; none for "none"."""
    return [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]


def _tracker(name: str, folder: str, config: dict):
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers require it
    kind = LOGGER_TYPE_TO_CLASS[name]
    run_name = os.path.basename(os.path.abspath(folder))
    tracker = kind(run_name, folder) if kind.requires_logging_directory else kind(run_name)
    tracker.start()
    tracker.store_init_configuration({key: value for key, value in config.items() if value is not None})
    return tracker
