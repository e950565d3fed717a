"""What stands between a run and its loss, the same for every stage: checkpoints, signals, the watchdog."""

import os
from typing import Self

from utils.distributed import rank, world_size
from utils.engine.engine import device
from utils.flags.run import RunFlags
from utils.run import restore
from utils.run.checkpoint import CheckpointWriter, Engines, Say
from utils.run.random_state import seed_streams
from utils.run.restore import Checkpoint
from utils.run.resume import identity
from utils.run.stop_signal import NAMES, Stop
from utils.run.watchdog import Watchdog


class Keeper:
    """Use it as a context around the loop; tell it after each step. `feed` it wherever something got done.

    `code`: the exit code with which the run has to stop now, 0 to go on; the same on every rank.
    """

    def __init__(self, config: RunFlags, engines: Engines, total_steps: int):
        self._config = config
        self._engines = engines
        self._folder = os.path.join(config.model_save_path, "checkpoints")
        self._writer = CheckpointWriter(self._folder, engines, config.keep_checkpoints)
        self._total_steps = total_steps
        self._stop = Stop(config.max_hours)
        self._watchdog = Watchdog(config.hang_timeout, rank())
        self.feed = self._watchdog.feed
        self.code = 0

    def __enter__(self) -> Self:
        self._stop.__enter__()
        self._watchdog.__enter__()
        return self

    def __exit__(self, kind, *error) -> None:
        try:
            if kind is None or world_size() == 1:  # other ranks may be anywhere when this one has failed
                self.settle()
        finally:
            self._watchdog.__exit__(kind, *error)
            self._stop.__exit__(kind, *error)

    def begin(self, start: Checkpoint | None, seed: int) -> None:
        """Engines and random streams as they were at `start`; None: streams of the seed and the rank. Collective."""
        seed_streams(seed, rank())
        if start:
            restore.restore(start, self._engines)

    def newest(self, say: Say) -> Checkpoint | None:
        """The run's last whole checkpoint, after waiting for one that is being written. Collective."""
        self.settle()
        return restore.newest(self._folder, say)

    def settle(self) -> None:
        """Waits for the checkpoint that is being written. Collective: call it before an error that all ranks raise."""
        self._writer.settle()
        self.feed("checkpoint")

    def after_step(self, state: dict, say: Say) -> None:
        """One rank's wish to stop becomes that of all; a checkpoint is written that is due, or needed now. Collective.

        state: the run's own numbers, JSON, with "step".
        """
        self.feed("step")
        step, every = state["step"], self._config.checkpoint_per_step
        code = self._stop.agree(device())
        self.code = code if step < self._total_steps else 0  # nothing is left to stop
        last = bool(self.code) or step >= self._total_steps  # nothing is left to do meanwhile
        if every and (step % every == 0 or self.code):
            self._writer.save(state | {"flags": identity(self._config)}, say, background=not last)
            self.feed("checkpoint")
        else:
            self._writer.settle(wait=last)
        if self.code:
            after = self._how_to_go_on() if every else "without a checkpoint"
            say(f"stopped by {NAMES[code]} after step {step}; {after}")

    def _how_to_go_on(self) -> str:
        """What to give again; some flags say where a run begins, and would have it begin there once more."""
        config, change = self._config, ""
        if config.overwrite:
            change = " without --overwrite"
        elif config.resume != "auto":
            change = " with --resume auto"
        return f"the same command{change} goes on from its checkpoint"
