"""Stops a run on all ranks together: after a signal in work that can be abandoned, or at the end of a step.

Once `requested` is True, work may end early: the next `check` discards its result. --max_hours ends whole steps.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import ClassVar, Literal, Self, TypeVar

import torch

from utils.device import device
from utils.distributed import max_ranks, message_store, world_size
from utils.watchdog import STOPS

OUT_OF_TIME = 75  # exit code of --max_hours: EX_TEMPFAIL of sysexits.h
GRACE = 3.0  # seconds within which a Ctrl-C after another signal is ignored: launchers may send it more than once
ALWAYS = (signal.SIGINT, signal.SIGTERM)  # the others may be ignored, as under nohup
POLL_INTERVAL = 1.0  # seconds between looks whether another rank got a signal
Result = TypeVar("Result")
NAMES = {128 + number: number.name for number in STOPS}
NAMES |= {128 + signal.SIGINT: "Ctrl-C", OUT_OF_TIME: "--max_hours"}


def set_hangup_action(ignore: bool | Literal["auto"]) -> None:
    """Ignores SIGHUP, or not. auto: under tmux and screen, and if it is ignored already, as under nohup."""
    if ignore == "auto":
        ignore = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN or bool(os.environ.keys() & {"TMUX", "STY"})
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignore else signal.SIG_DFL)


class Abandoned(Exception):
    """Raised by `check` on all ranks. code: the code to exit with."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class Stop:
    """Context in which the first signal stops the run, and a later Ctrl-C ends the process at once.

    Only Ctrl-C, because launchers and schedulers repeat the other signals; to kill a process they use SIGKILL.
    """

    current: ClassVar["Stop | None"] = None  # while the run does what it can abandon; `RunLifecycle` sets it

    def __init__(self, max_hours: float):
        self.code = 0  # the signal's, 0 before it
        self.interrupts = False  # whether the signal raises KeyboardInterrupt
        self._since = 0.0
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self._before = {}
        self._ended = threading.Event()
        self._forwarder = threading.Thread(target=self._forward, name="stop signal", daemon=True)

    def __enter__(self) -> Self:
        for number in STOPS:
            if number in ALWAYS or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        if world_size() > 1:
            self._forwarder.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._forwarder.ident:
            self._forwarder.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if not self.code:
            self.code, self._since = 128 + number, time.monotonic()
            with contextlib.suppress(OSError):  # the terminal may be gone
                text = f"stopping once the run can be resumed from there; Ctrl-C after {GRACE:g} s stops at once"
                os.write(2, f"\n{text}\n".encode())
            if self.interrupts:
                raise KeyboardInterrupt
        elif number == signal.SIGINT and time.monotonic() - self._since > GRACE:
            os._exit(128 + number)

    def _forward(self) -> None:
        """Sends the signal to the other ranks: DeepSpeed's launcher signals the next rank only when one has ended."""
        key = "signal"
        with contextlib.suppress(RuntimeError):  # the process that holds the store has ended
            store = message_store("stop")
            while not self._ended.wait(POLL_INTERVAL):
                if self.code:
                    store.set(key, str(self.code - 128))
                    return
                if store.check([key]):
                    signal.pthread_kill(threading.main_thread().ident, int(store.get(key)))
                    return

    def exit_code(self, device: torch.device) -> int:
        """Returns the code to exit with if any rank has to stop, else 0; the same on all ranks. Collective."""
        late = OUT_OF_TIME if time.monotonic() > self._deadline else 0
        return max_ranks(self.code or late, device)


def requested() -> bool:
    """Whether this rank got a signal in work that the run can abandon. The work may then end early, up to a `check`."""
    return Stop.current is not None and Stop.current.code > 0


def check() -> None:
    """Raises Abandoned on all ranks if any of them has `requested` it. Collective if the run can abandon its work."""
    if Stop.current and (code := max_ranks(Stop.current.code, device())):
        raise Abandoned(code)


def interruptible(function: Callable[[], Result]) -> Result | None:
    """Calls a function, in which the signal raises KeyboardInterrupt; returns None if it came, whatever the outcome.

    For users' code without collectives, which may take minutes; a `check` has to follow.
    """
    stop = Stop.current
    if stop is None:
        return function()
    try:
        stop.interrupts = True
        result = None if stop.code else function()
        stop.interrupts = False
    except BaseException:  # also what the user's code makes of the KeyboardInterrupt
        stop.interrupts = False
        if not stop.code:
            raise
    return None if stop.code else result
