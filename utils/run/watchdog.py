"""Ends a process that makes no progress, so that a dead or stuck rank does not block the others forever."""

import faulthandler
import os
import sys
import threading
from typing import Self

HUNG = 124  # exit code, as of timeout(1)


class Watchdog:
    """Context in which the process exits with code 124 unless `reset` is called every `timeout` seconds; 0 disables.

    Counts its own ticks, so that a run may be suspended and continued.
    """

    def __init__(self, timeout: float, rank: int):
        self.timeout = timeout
        self._rank = rank
        self._idle = 0.0  # seconds
        self._phase = "start"
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if self.timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def reset(self, phase: str) -> None:
        """Restarts the count after progress. phase: what was completed, for the message."""
        self._idle, self._phase = 0.0, phase

    def _watch(self) -> None:
        tick = min(1.0, self.timeout / 10)
        while not self._done.wait(tick):
            self._idle += tick
            if self._idle > self.timeout:
                print(
                    f"error [rank {self._rank}]: no progress for {self.timeout:g} s (--hang_timeout) after "
                    f"{self._phase!r}: this rank or another one is dead or stuck. Stacks of this rank:",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                os._exit(HUNG)
