"""The watchdog: who gets something done is left alone, also after a sleep; who does not is ended, with stacks."""

import os
import re
import signal
import subprocess
import sys
import time

from tests.helpers.tiny_run import REPOSITORY
from utils.run.watchdog import HUNG

# Gets something done for 2.5 seconds, twice as long as the watchdog waits, says so, and then nothing more.
SCRIPT = """
import sys, time
from utils.run.watchdog import Watchdog

def stands_still():
    time.sleep(60)

with Watchdog(1.2, 3) as watchdog:
    for i in range(10):
        time.sleep(0.25)
        watchdog.reset(f"lap {i}")
    print("alive", flush=True)
    if sys.argv[1:]:
        stands_still()
"""


def begin(*words: str) -> subprocess.Popen:
    """The script, in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, *words]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_progress_is_let_be_and_a_standstill_ends_with_stacks():
    process = begin("stand still")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (HUNG, "alive\n")
    assert re.match(r"error \[rank 3\]: no progress for 1.2 s \(--hang_timeout\) after 'lap 9': ", err)
    assert "in stands_still" in err


def test_a_process_that_slept_as_a_whole_goes_on():
    """A laptop that was closed, a job that a scheduler suspends: that is nobody's hang."""
    process = begin()
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "alive\n", "")
