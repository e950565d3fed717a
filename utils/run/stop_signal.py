"""Stops a run at the end of a step, on all ranks together: after a signal or --max_hours."""

import contextlib
import os
import signal
import time
from typing import Literal, Self

import torch

from utils.distributed import is_main, max_ranks
from utils.watchdog import STOPS

OUT_OF_TIME = 75  # exit code of --max_hours: EX_TEMPFAIL of sysexits.h
GRACE = 3.0  # seconds within which a Ctrl-C after another signal is ignored: launchers may send it more than once
ALWAYS = (signal.SIGINT, signal.SIGTERM)  # the others may be ignored, as under nohup
NAMES = {128 + number: number.name for number in STOPS}
NAMES |= {128 + signal.SIGINT: "Ctrl-C", OUT_OF_TIME: "--max_hours"}


def set_hangup_action(ignore: bool | Literal["auto"]) -> None:
    """Ignores SIGHUP, or not. auto: under tmux and screen, and if it is ignored already, as under nohup."""
    if ignore == "auto":
        ignore = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN or bool(os.environ.keys() & {"TMUX", "STY"})
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignore else signal.SIG_DFL)


class Stop:
    """Context in which a signal takes effect at the end of the step, and a later Ctrl-C at once.

    Only Ctrl-C, because launchers and schedulers repeat the other signals; to kill a process they use SIGKILL.
    """

    def __init__(self, max_hours: float):
        self._code = 0
        self._since = 0.0
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self._before = {}

    def __enter__(self) -> Self:
        for number in STOPS:
            if number in ALWAYS or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if not self._code:
            self._code, self._since = 128 + number, time.monotonic()
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"\nstopping at the end of this step; Ctrl-C after {GRACE:g} s stops at once\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._since > GRACE:
            os._exit(128 + number)

    def exit_code(self, device: torch.device, due: bool = False) -> tuple[int, bool]:
        """Returns (the code to exit with, not 0 if any rank has to stop; whether rank 0 says `due`). Collective.

        Both are the same on all ranks; `due` counts only if the code is 0.
        """
        late = OUT_OF_TIME if time.monotonic() > self._deadline else 0
        code, due = divmod(max_ranks(2 * (self._code or late) + (due and is_main()), device), 2)
        return code, bool(due)
