"""Ends a process that makes no progress, so that a dead or stalled rank does not leave the others waiting for ever."""

import faulthandler
import os
import sys
import threading
from typing import Self

HUNG = 124  # exit code, as of timeout(1)


class Watchdog:
    """Inside `with`, the process has to `feed` it every `timeout` seconds (0: it sleeps), or it ends with code 124.

    It counts its own ticks rather than the clock, so that a run that was suspended as a whole may go on. A rank that
    stands still says nothing itself; those that wait for it say where they wait.
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

    def feed(self, phase: str) -> None:
        """Something got done; `phase` is its name, for the message."""
        self._idle, self._phase = 0.0, phase

    def _watch(self) -> None:
        tick = min(1.0, self.timeout / 10)
        while not self._done.wait(tick):
            self._idle += tick
            if self._idle > self.timeout:
                print(
                    f"error [rank {self._rank}]: nothing got done for {self.timeout:g} s (--hang_timeout) after "
                    f"{self._phase!r}: another rank has died or stands still, or this one does. Its stacks:",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                os._exit(HUNG)
