"""Lock of a run's folder: `run.lock` names the process that trains there, and a second trainer is refused.

A POSIX lock, which the system or NFS's lock daemon drops when the process ends, however it ends. Closing any other
descriptor of the file would drop it as well, so the holder opens the file once. Where the file system has no locks, a
thread touches the file, and a file that is STALE seconds old by that file system's clock is free.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from utils.distributed import gather_objects, is_main
from utils.errors import UserError
from utils.files import check_writable, disk_errors, existing_parent, remove_empty
from utils.schema import Schema, checked

LOCK = "run.lock"
BEAT, STALE = 15.0, 300.0  # seconds
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)

held = contextlib.ExitStack()  # a trainer runs in it: what `hold_folder` locked is free at its end


class Holder(Schema):
    """Content of run.lock. since: local time."""

    host: str = Field(pattern=r"^[\w.:-]+$")
    pid: int
    since: str = Field(pattern=r"^[\d :-]+$")


def hold_folder(run: str) -> None:
    """Locks a run's folder until `held` is left or the process ends; creates it. Raises UserError. Collective."""
    problem = None
    if is_main():
        try:
            check_writable(run, "--model_save_path")
            with disk_errors(f"--model_save_path {run}"):
                held.enter_context(_locked(run))
        except UserError as error:
            problem = str(error)
    if problem := gather_objects(problem)[0]:
        raise UserError(problem)


@contextlib.contextmanager
def _locked(run: str) -> Iterator[None]:
    """Context of the lock. Removes run.lock at its end, and folders that it created if nothing else is in them."""
    path, existing, ended = os.path.join(run, LOCK), existing_parent(run), threading.Event()
    since = datetime.datetime.now().isoformat(" ", "seconds")
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n"
    try:
        os.makedirs(run, exist_ok=True)
        with _take(path, text) as has_locks:
            if not has_locks:
                threading.Thread(target=_beat, args=(path, ended), name="run.lock", daemon=True).start()
            try:
                yield
            finally:
                ended.set()
                with contextlib.suppress(OSError):
                    os.remove(path)
    finally:
        remove_empty(os.path.abspath(run), existing)


@contextlib.contextmanager
def _take(path: str, text: str) -> Iterator[bool]:
    """Locks the file and writes `text` to it. Yields whether the file system has locks."""
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            file.seek(0)
            content, has_locks = file.read(1000), True
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise _in_use(path, content) from None
                if error.errno not in NO_LOCKS:
                    raise
                has_locks = False
                if content and _age(path) < STALE:
                    raise _in_use(path, content, f"; if it was killed, wait {STALE / 60:g} minutes") from None
            if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                continue  # its holder has just removed it
            file.truncate(0)
            file.write(text)
            file.flush()
            if not has_locks:
                time.sleep(1.0)  # of two that take it at the same time, the last to write has it
                if (content := Path(path).read_text("utf-8")) != text:
                    raise _in_use(path, content)
            yield has_locks
            return


def _age(path: str) -> float:
    """Seconds since a file was touched, by the clock of its file system."""
    with tempfile.TemporaryFile(dir=os.path.dirname(path) or ".") as now:
        return os.fstat(now.fileno()).st_mtime - os.stat(path).st_mtime


def _beat(path: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _in_use(path: str, content: str, hint: str = "") -> UserError:
    try:
        holder = checked(Holder, json.loads(content))
        who, stop = f"process {holder.pid} on {holder.host} since {holder.since}", f": kill {holder.pid}, on that host"
    except (ValueError, RecursionError):
        who, stop = "another process", ""
    what = f"--model_save_path {os.path.dirname(path)} is in use by {who}"
    return UserError(f"{what}; use another folder, wait for it, or stop it{stop}{hint}")
