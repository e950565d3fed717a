"""Ends a run at a step boundary, on all ranks together: Ctrl-C, SIGTERM (a scheduler's notice), --max_hours."""

import os
import signal
import time
from typing import Self

import torch

from utils.distributed import max_ranks, world_size

OUT_OF_TIME = 75  # exit code of --max_hours: sysexits.h's "try again"
GRACE = 3.0  # seconds within which a launcher may pass the same wish on more than once
NAMES = {128 + signal.SIGINT: "Ctrl-C", 128 + signal.SIGTERM: "SIGTERM", OUT_OF_TIME: "--max_hours"}


class Stop:
    """Inside `with`, the first signal waits for the next step boundary, and a second one ends the process at once."""

    def __init__(self, max_hours: float):
        self._asked = 0
        self._since = 0.0
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self._before = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if not self._asked:
            self._asked, self._since = 128 + number, time.monotonic()
            os.write(2, b"\nstopping at the end of this step; a second signal stops at once\n")
            if world_size() == 1:  # no launcher that repeats itself: let the system act, whatever Python is busy with
                for each in self._before:
                    signal.signal(each, signal.SIG_DFL)
        elif time.monotonic() - self._since > GRACE:
            os._exit(128 + number)

    def agree(self, device: torch.device) -> int:
        """The code to exit with, 0 to go on, the same on every rank: what one wishes, all do. Collective."""
        late = OUT_OF_TIME if time.monotonic() > self._deadline else 0
        return max_ranks(self._asked or late, device)
