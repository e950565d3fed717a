"""Ranks go on together or end together: an error on one rank ends all ranks with one message.

Messages go through the store of the process group, so that they also reach ranks that wait in a collective.
"""

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from utils.distributed import message_store, node_ranks, rank, share_in_node, world_size
from utils.errors import LINGER, SharedError, problem_of
from utils.files import first_names
from utils.notices import notify
from utils.watchdog import report_progress

PATIENCE = 5.0  # seconds that the other ranks have to leave the body after one has failed
BEAT = 1.0  # seconds between signs of life
Result = TypeVar("Result")

held = contextlib.ExitStack()  # of a trainer: what is released at its end or exit, such as the lock of `hold_folder`
_numbers = itertools.count()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Context in which an error on one rank is raised on all ranks, as a UserError that names the rank. Collective.

    The body may contain collectives; a rank that is still in it PATIENCE seconds after the error exits with code 2. A
    rank that has left the body waits for the others as long as their watchdogs let them run. An exception that is no
    mistake of the user stays as it is on its own rank.
    """
    if world_size() == 1:
        yield
        return
    section, left = _Section(), threading.Event()
    threading.Thread(target=section.watch, args=(left,), name="together", daemon=True).start()
    own = None
    try:
        yield
    except SharedError:  # of a section inside this one: all ranks have it
        raise
    except Exception as error:  # noqa: BLE001 - raised again below
        own = error
    finally:
        left.set()
    text = own and (problem_of(own) or f"{type(own).__name__}: {' '.join(str(own).split())}; see its traceback")
    shared = None
    try:
        shared = section.end(text or "")
    except RuntimeError:  # the process that holds the store has ended
        if not own:
            raise
    if own and not (shared and problem_of(own)):
        raise own
    if shared:
        raise shared from own


def once_per_node(function: Callable[[], Result]) -> Result:
    """Calls a function on the first rank of each node; returns its result on all ranks. Raises as `together` does.

    The function has no collectives and changes nothing that other ranks need. Collective.
    """
    ranks = node_ranks()
    with together():
        result = function() if rank() == ranks[0] else None
    return share_in_node(result, ranks)


class _Section:
    """What the ranks tell each other in one `together`: who has ended, and with which error."""

    def __init__(self):
        self._store = message_store(f"together/{next(_numbers)}")
        self._deadline, self._exits = float("inf"), False

    def watch(self, left: threading.Event) -> None:
        """Shows that this rank lives, until it leaves the body. Exits if another rank has failed."""
        with contextlib.suppress(RuntimeError):  # the rank that holds the store has ended
            while not left.wait(BEAT):
                self._store.add("beats", 1)
                if self._out_of_patience() and not left.is_set():
                    self._exits, error = True, self.error()
                    notify("failed", str(error))
                    if not error.is_silent:
                        print(f"error [rank {rank()}]: {error}", file=sys.stderr, flush=True)
                    held.close()
                    self._store.add("ended", 1)
                    time.sleep(LINGER)
                    os._exit(2)

    def end(self, problem: str) -> SharedError | None:
        """Tells the others this rank's problem ("": none), waits for them, and returns the error of all, if any."""
        if self._exits:
            time.sleep(2 * LINGER)
        self._store.set(str(rank()), f"{socket.gethostname()}\n{problem}".encode(errors="backslashreplace"))
        self._store.add("failed", int(bool(problem)))
        ended, beats, pause = self._store.add("ended", 1), 0, 0.005
        while ended < world_size() and not self._out_of_patience(3 * BEAT):  # later than those in `watch`
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
            if beats != (beats := self._store.add("beats", 0)):
                report_progress("wait for other ranks")
            ended = self._store.add("ended", 0)
        error, gone = self.error() if self._store.add("failed", 0) else None, self._store.add("gone", 1)
        deadline = time.monotonic() + LINGER
        while rank() == 0 and gone < world_size() and time.monotonic() < deadline:  # the store ends with rank 0
            time.sleep(0.005)
            gone = self._store.add("gone", 0)
        return error

    def error(self) -> SharedError:
        """Returns the error of the first rank that has one."""
        texts = [self._store.get(str(i)).decode() if self._store.check([str(i)]) else "\n" for i in range(world_size())]
        failed = [i for i, text in enumerate(texts) if not text.endswith("\n")]
        host, _, problem = texts[failed[0]].partition("\n")
        same = [str(i) for i in failed if texts[i].partition("\n")[2] == problem]
        if rank() != failed[0] and len(same) < world_size():
            where = "" if host == socket.gethostname() else f" on {host}"
            problem = f"rank{'s' * (len(same) > 1)} {first_names(same)}{where}: {problem}"
        # `init_distributed` sets LOCAL_RANK to 0 in a task of srun with one GPU; ranks of a launcher share one task.
        is_first = all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_LOCALID"))
        return SharedError(problem, is_silent=rank() != failed[0] and not is_first)

    def _out_of_patience(self, more: float = 0.0) -> bool:
        if self._store.add("failed", 0):
            self._deadline = min(self._deadline, time.monotonic() + PATIENCE + more)
        return time.monotonic() > self._deadline
