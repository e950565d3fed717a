"""Run lifecycle: checkpoints and signals. The same for all stages."""

import os
import time
from typing import Self

from utils.distributed import any_rank, gather_objects, rank, world_size
from utils.engine.engine import device
from utils.errors import Say
from utils.flags.run import RunFlags
from utils.run import restore
from utils.run.checkpoint import CheckpointWriter, Engines, all_checkpoints
from utils.run.random_state import random_state, seed_streams, set_random_state
from utils.run.restore import Checkpoint
from utils.run.resume import identity
from utils.run.stop_signal import NAMES, Abandoned, Stop
from utils.watchdog import report_progress


class RunLifecycle:
    """Context of a training loop, which calls `after_step` after each step.

    `exit_code`: the code with which the run has to stop now, 0 to continue; the same on all ranks. The context ends
    without an exception if work after `begin` is abandoned because of a signal.
    """

    def __init__(self, config: RunFlags, engines: Engines, total_steps: int):
        self._config, self._engines, self._total_steps = config, engines, total_steps
        self._folder = os.path.join(config.model_save_path, "checkpoints")
        self._writer = CheckpointWriter(self._folder, engines, config.keep_checkpoints)
        self._stop = Stop(config.max_hours)
        self._saved_at = time.monotonic()
        self._saved: dict = {}  # state of the newest checkpoint
        self.exit_code = 0

    def __enter__(self) -> Self:
        self._stop.__enter__()
        self._saved_at = time.monotonic()
        return self

    def __exit__(self, kind, error, trace) -> bool:
        Stop.current = None
        try:
            if kind is Abandoned:
                self._abandon(error.code)
            elif kind is None or world_size() == 1:  # after an error, other ranks may not reach the same collective
                self.finish_checkpoint()
        finally:
            self._stop.__exit__(kind, error, trace)
        return kind is Abandoned

    def restore(self, checkpoint: Checkpoint | None, seed: int) -> None:
        """Seeds this rank's random streams; restores streams and engines from the checkpoint, if any. Collective."""
        seed_streams(seed, rank())
        if checkpoint:
            restore.restore(checkpoint, self._engines)
            self._saved = checkpoint.state
            report_progress("restored checkpoint")

    def newest_checkpoint(self, say: Say) -> Checkpoint | None:
        """Returns the run's newest intact checkpoint, after any that is being written is complete. Collective."""
        self.finish_checkpoint()
        return restore.newest(self._folder, say)

    def finish_checkpoint(self) -> None:
        """Completes the checkpoint that is being written, also before an error that all ranks raise. Collective."""
        self._writer.finish()
        report_progress("checkpoint")

    def begin(self, state: dict | None, say: Say) -> None:
        """Begins work that a signal abandons (`stop_signal.check`), up to the next `begin` or `after_step`.

        The run then stops with a checkpoint of `state` and of the random streams of now. The engines must not change
        before the last `check`. state: None if the work is not to be abandoned.
        """
        self._begun, Stop.current = (state, random_state(), say), self._stop if state else None

    def after_step(self, state: dict, say: Say) -> None:
        """Writes a checkpoint of `state`, JSON, if one is due; sets `exit_code` if any rank has to stop. Collective."""
        Stop.current = None
        report_progress("step")
        step, every = state["step"], self._config.checkpoint_per_step
        interval = 60 * self._config.checkpoint_minutes or float("inf")
        due = any_rank(time.monotonic() - self._saved_at >= interval, device())
        code = self._stop.exit_code(device())
        self.exit_code = code if step < self._total_steps else 0
        last = bool(self.exit_code) or step >= self._total_steps  # no step follows during which to write
        if every and (step % every == 0 or due or self.exit_code):
            self._save(state, say, background=not last)
        else:
            self._writer.finish(wait=last)
        if self.exit_code:
            say(f"stopped by {NAMES[code]} after step {step}; {self._resume_advice(step)}")

    def _save(self, state: dict, say: Say, background: bool) -> None:
        record = {"flags": identity(self._config), "inputs": self._config.fingerprints}
        self._saved, self._saved_at = state, time.monotonic()
        self._writer.save(state | record, say, background)
        report_progress("checkpoint")

    def _abandon(self, code: int) -> None:
        """Goes back to the last `begin`, saves that unless it is saved, and sets `exit_code`. Collective."""
        state, streams, say = self._begun
        set_random_state(streams)
        self.finish_checkpoint()
        step, found = state["step"], gather_objects(all_checkpoints(self._folder)[:1])[0]
        is_saved = state.items() <= self._saved.items() and [number for number, _ in found] == [step]
        if step and self._config.checkpoint_per_step and not is_saved:
            self._save(state, say, background=False)
        self.exit_code = code
        say(f"stopped by {NAMES[code]} after step {step}; what followed is made again; {self._resume_advice(step)}")

    def _resume_advice(self, step: int) -> str:
        config, change = self._config, ""
        if not config.checkpoint_per_step:
            return "without a checkpoint (--checkpoint_per_step 0)"
        if config.overwrite:
            change = " without --overwrite"
        elif config.resume != "auto":
            change = " with --resume auto"
        return f"the same command{change} {'resumes from its checkpoint' if step else 'starts again'}"
