"""Stops a run at the end of a step, on all ranks together: after Ctrl-C, SIGTERM or --max_hours."""

import os
import signal
import time
from typing import Self

import torch

from utils.distributed import max_ranks, world_size

OUT_OF_TIME = 75  # exit code of --max_hours: EX_TEMPFAIL of sysexits.h
GRACE = 3.0  # seconds within which a repeated signal is ignored: launchers may send it more than once
NAMES = {128 + signal.SIGINT: "Ctrl-C", 128 + signal.SIGTERM: "SIGTERM", OUT_OF_TIME: "--max_hours"}


class Stop:
    """Context in which one signal takes effect at the end of the step, and a second one ends the process at once."""

    def __init__(self, max_hours: float):
        self._code = 0
        self._since = 0.0
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self._before = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if not self._code:
            self._code, self._since = 128 + number, time.monotonic()
            os.write(2, b"\nstopping at the end of this step; a second signal stops at once\n")
            if world_size() == 1:  # no launcher repeats signals; the default handlers also interrupt native code
                for each in self._before:
                    signal.signal(each, signal.SIG_DFL)
        elif time.monotonic() - self._since > GRACE:
            os._exit(128 + number)

    def exit_code(self, device: torch.device) -> int:
        """Returns the code to exit with, not 0 if any rank has to stop; the same on all ranks. Collective."""
        late = OUT_OF_TIME if time.monotonic() > self._deadline else 0
        return max_ranks(self._code or late, device)
