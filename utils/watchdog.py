"""Ends a rank that makes no progress, and stops one whose launcher has died. A process beside each rank watches it.

It works also while the rank imports, loads or saves, or runs code that holds Python's global lock. Run with
`python utils/watchdog.py PID TIMEOUT RANK LAUNCHER`; standard input is a socket, on which the rank reports progress.
"""

import contextlib
import faulthandler
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

Item = TypeVar("Item")
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # on which a run saves and ends
HUNG = 124  # exit code, as of timeout(1)
STACKS = signal.SIGRTMIN + 6  # signal upon which a watched process prints its stacks
GRACE = 5.0  # seconds that a process without progress has to print its stacks and exit; it is killed afterwards
DOWNLOAD = "start of a download"  # progress after which time does not count
SHELLS = ("sh", "bash", "dash", "zsh", "fish", "ksh", "tcsh")  # from which a user starts ranks by hand, and logs out


class Watchdog:
    """Context in which the process exits with code 124 unless `report_progress` is called every `timeout` seconds.

    timeout: 0 disables this. The time in which the process is suspended does not count. If the process has a launcher
    that dies, it gets SIGUSR1, so that it saves and ends; this happens at any timeout.
    """

    current: "Watchdog | None" = None  # of this process

    def __init__(self, timeout: float):
        self._words = [str(word) for word in (os.getpid(), timeout, os.environ.get("RANK", "0"), LAUNCHER)]
        self._needed = bool(timeout or LAUNCHER)

    def __enter__(self) -> Self:
        if self._needed:
            import subprocess
            import threading

            faulthandler.register(STACKS, file=2, all_threads=True)
            self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-I", "-S", os.path.abspath(__file__), *self._words]
            self._process = subprocess.Popen(command, stdin=other, stdout=subprocess.DEVNULL, start_new_session=True)
            other.close()
            threading.Thread(target=self._exit_when_told, name="watchdog", daemon=True).start()
            Watchdog.current = self
        return self

    def __exit__(self, *_) -> None:
        if self._needed:
            Watchdog.current = None
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def report(self, phase: str) -> None:
        """Restarts the count. phase: what was completed."""
        with contextlib.suppress(OSError):  # it has been killed, or is suspended and its queue is full
            self._socket.send(phase.encode(errors="replace")[:200], socket.MSG_DONTWAIT)

    def _exit_when_told(self) -> None:
        with contextlib.suppress(OSError):
            if self._socket.recv(1):
                os._exit(HUNG)


def report_progress(phase: str) -> None:
    """Restarts the watchdog's count, if there is one. phase: what was completed, for the message."""
    if Watchdog.current:
        Watchdog.current.report(phase)


@contextlib.contextmanager
def downloading() -> Iterator[None]:
    """Context in which no limit of time applies, since downloads take any time and have limits of their own."""
    report_progress(DOWNLOAD)
    try:
        yield
    finally:
        report_progress("download")


def with_progress(items: Iterable[Item], phase: str) -> Iterator[Item]:
    """Yields the items, and reports progress every 100 of them."""
    for i, item in enumerate(items):
        yield item
        if i % 100 == 99:
            report_progress(phase)


def watch(pid: int, timeout: float, rank: int, launcher: int) -> None:
    """Watches the process that started this one until it ends. launcher: process id, 0 if there is none."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # launchers and schedulers send them to all processes
    parents = {pid: launcher} if launcher else {}
    if b"deepspeed.launcher.launch" in _read(f"/proc/{launcher}/cmdline"):  # started by the command `deepspeed`
        parents[launcher] = _state(launcher)[1]
    idle, phase, tick = 0.0, "start", min(1.0, timeout / 10 or 1.0)
    while os.getppid() == pid:
        if select.select([0], [], [], tick)[0]:
            phase = os.read(0, 200).decode(errors="replace")
            idle = -math.inf if phase == DOWNLOAD else 0.0
            if not phase:
                return
        elif _state(pid)[0] not in "Tt":  # not suspended. Ticks: while this process is suspended, none is counted
            idle += tick
        if any(_state(child)[1] not in (parent, 0) for child, parent in parents.items()):
            parents.clear()
            _say(f"error [rank {rank}]: the launcher, process {launcher}, has died; this rank stops, as after SIGUSR1")
            os.kill(pid, signal.SIGUSR1)  # unlike SIGTERM, never taken for a second signal
        if timeout and idle > timeout:
            _end(pid, timeout, rank, phase)
            return


def _end(pid: int, timeout: float, rank: int, phase: str) -> None:
    """Makes the process print its stacks and exit with code 124; kills it if it cannot."""
    _say(
        f"error [rank {rank}]: no progress for {timeout:g} s (--hang_timeout) after {phase!r}: this rank or another "
        "one is dead or stuck. Stacks of this rank:"
    )
    os.kill(pid, STACKS)
    time.sleep(2.0)
    os.write(0, b"x")
    deadline = time.monotonic() + GRACE
    while os.getppid() == pid and time.monotonic() < deadline:
        time.sleep(0.1)
    if os.getppid() == pid:
        _say(f"error [rank {rank}]: killed, because its code does not let Python's other threads run")
        os.kill(pid, signal.SIGKILL)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _state(pid: int) -> tuple[str, int]:
    """Returns a process's state, as a letter, and its parent; ("?", 0) if they are unknown."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return (fields[0].decode(), int(fields[1])) if fields else ("?", 0)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _launcher() -> int:
    """Returns the process id of the launcher that started this rank, 0 without one."""
    parent = os.getppid()
    name = _read(f"/proc/{parent}/comm").decode(errors="replace").strip()
    is_rank = "RANK" in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"  # as in utils/slurm.py
    return parent if is_rank and name not in SHELLS else 0


LAUNCHER = _launcher()  # this file is imported at the very start

if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
