"""Moments at which a run is killed: in the middle of what happens once in many steps, and at any time at all."""

import itertools
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial

import ppo.run
from ppo.run import Run
from tests.faults.faults import PHASES, Fault, at_call, before_calls, send
from utils.engine.engine import TrainEngine

ANY_TIME, STEPS = "any time", 16  # optimizer steps of a process after which it is killed whatever the time is


CHANGES = {"mkdir", "open", "fsync", "close", "replace", "rename", "unlink", "rmdir"}  # of files, in module os


def is_change(event: str, called) -> bool:
    """Whether the interpreter's event is a call of the operating system that changes files."""
    return event == "c_call" and called.__name__ in CHANGES


# Phase -> function that it is, which of its calls, which events in it count, and at which of these, at most, is a kill
INSIDE = {
    "evaluation": (ppo.run, "evaluate", lambda *args: True, lambda event, called: event == "call", 5000),
    "export of best/": (Run, "export", lambda run, name: name == "best", is_change, 40),
    "rollback": (Run, "_collapses", lambda run, signs: signs, is_change, 60),
    "export of final/": (Run, "export", lambda run, name: name == "final", is_change, 28),
}
LIMITS = {phase: limit for phase, (_, _, limit) in PHASES.items()}
LIMITS |= {phase: limit for phase, (*_, limit) in INSIDE.items()} | {ANY_TIME: 2500}  # milliseconds
STOPPED = "SIGTERM in "  # in place of SIGKILL
LIMITS |= {STOPPED + phase: PHASES[phase][2] for phase in ("rollout", "scoring")}


def kill_at(victim: int, phase: str, number: int) -> Fault:
    """On the rank `victim`, SIGKILL (or SIGTERM) at that call, event or millisecond of the phase."""
    if phase.startswith(STOPPED):
        return at_call(victim, phase.removeprefix(STOPPED), number, signal.SIGTERM)
    if phase in PHASES:
        return at_call(victim, phase, number)
    begin = partial(at_time, number) if phase == ANY_TIME else partial(inside, *INSIDE[phase][:4], number)
    return lambda rank: begin() if rank == victim else None


def at_time(milliseconds: int) -> None:
    """So long after its start the process is killed, or after a number of steps, if these are quicker."""
    timer = threading.Timer(milliseconds / 1000, send, [signal.SIGKILL])
    timer.daemon = True
    timer.start()
    before_calls(TrainEngine, "apply", {STEPS: partial(send, signal.SIGKILL)})


def inside(owner, name: str, is_meant: Callable[..., bool], counts: Callable[..., bool], number: int) -> None:
    """The first call of a function that is meant is killed at that event in it, or when it returns."""
    function, left = getattr(owner, name), itertools.count(number - 1, -1)

    def watch(_, event: str, called) -> None:
        if counts(event, called) and not next(left):
            send(signal.SIGKILL)

    def watched(*args, **kwargs):
        sys.setprofile(watch if is_meant(*args) else None)
        result = function(*args, **kwargs)
        if is_meant(*args):
            send(signal.SIGKILL)
        return result

    setattr(owner, name, watched)
