"""The process beside a rank: ends it when it makes no progress, stops it when its launcher dies, else lets it be."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.tiny_run import REPOSITORY, clean_environment
from utils.watchdog import HUNG, Watchdog, report_progress, with_progress

# Reports progress for 2.5 seconds, twice as long as the watchdog waits, and downloads for 2 seconds; prints a line, and
# then may stand still.
WATCHED = """
import contextlib, os, re, signal, sys, time
from utils.watchdog import Watchdog, downloading, report_progress

def stop(number, frame):
    print("stopped by", number, flush=True)
    sys.exit(number)

def stands_still():
    time.sleep(60)

def download_fails():
    with contextlib.suppress(OSError), downloading():
        raise OSError
    stands_still()

def holds_the_lock():
    re.match("(a+)+$", "a" * 60 + "b")

signal.signal(signal.SIGUSR1, stop)
with Watchdog(1.2):
    for i in range(10):
        time.sleep(0.25)
        report_progress(f"lap {i}")
    with downloading():
        time.sleep(2.0)
    report_progress("lap 10")
    print("alive", flush=True)
    if sys.argv[1:]:
        globals()[sys.argv[1]]()
"""
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY}


def watched(*words: str) -> subprocess.Popen:
    """Starts that script in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", WATCHED, *words], env=clean_environment() | {"RANK": "3"}, **PIPES)


@pytest.mark.parametrize(
    ("state", "code", "last"),
    [
        ("stands_still", HUNG, "lap 10"),
        ("download_fails", HUNG, "download"),
        ("holds_the_lock", -signal.SIGKILL, "lap 10"),
    ],
)
def test_progress_is_let_be_and_a_standstill_ends_with_stacks(state, code, last):
    process = watched(state)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "alive\n")
    assert re.match(rf"error \[rank 3\]: no progress for 1.2 s \(--hang_timeout\) after '{last}': ", err)
    assert f"in {state}" in err
    assert ("killed, because its code does not let" in err) == (code != HUNG)


def test_a_process_that_was_suspended_goes_on():
    """A laptop that was closed, or a job that a scheduler suspends, does not hang."""
    process = watched()
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "alive\n", "")


LAUNCHERS = {
    "python": [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"],
    "shell": ["bash", "-c", '"$@" & wait', "-"],
}


@pytest.mark.parametrize(("parent", "is_rank"), [("python", True), ("python", False), ("shell", True)])
def test_a_rank_stops_when_its_launcher_dies(parent, is_rank):
    """A process without RANK has no launcher, and a shell is none: a user may start ranks by hand and log out."""
    environment = clean_environment() | ({"RANK": "3"} if is_rank else {})
    command, is_rank = [*LAUNCHERS[parent], sys.executable, "-c", WATCHED], is_rank and parent != "shell"
    with subprocess.Popen(command, env=environment, **PIPES) as launcher:
        time.sleep(1.0)
        launcher.kill()
        out, err = launcher.communicate(timeout=30)
    assert out == (f"stopped by {int(signal.SIGUSR1)}\n" if is_rank else "alive\n")
    said = rf"error \[rank 3\]: the launcher, process {launcher.pid}, has died; this rank stops, as after SIGUSR1\n"
    assert re.fullmatch(said if is_rank else "", err)


def test_a_process_without_limit_and_launcher_has_none_beside_it():
    with Watchdog(0.0):
        assert Watchdog.current is None
        report_progress("this goes nowhere")
    with Watchdog(100.0):
        assert Watchdog.current
        assert list(with_progress(range(1000), "items")) == list(range(1000))
        beside = Watchdog.current._process
    assert Watchdog.current is None and beside.returncode is not None
