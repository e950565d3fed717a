"""Lock of a run's folder: `run.lock` names the process that trains there, and a second trainer is refused.

A POSIX lock, which the system or NFS's lock daemon drops when the process ends, however it ends. Closing any other
descriptor of the file would drop it as well, so the holder opens the file once. A thread touches the file: where the
file system has no locks, or has locks that only one host sees, a file that is less than STALE seconds old by that file
system's clock is in use.
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
from pathlib import Path

from pydantic import Field

from utils.distributed import gather_objects, is_main, rank
from utils.errors import UserError
from utils.files import check_writable, disk_errors, existing_parent, remove_empty
from utils.run.together import held, together
from utils.schema import Schema, checked
from utils.watchdog import report_progress

LOCK = "run.lock"
BEAT, STALE = 15.0, 300.0  # seconds
SEEN = 90.0  # seconds until all nodes see a new file: NFS caches the content of folders for up to a minute
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)


class Holder(Schema):
    """Content of run.lock. since: local time."""

    host: str = Field(pattern=r"^[\w.:-]+$")
    pid: int = Field(gt=0)
    since: str = Field(pattern=r"^[\d :-]+$")


def hold_folder(run: str) -> None:
    """Locks a run's folder until `held` is left or the process ends; creates it. Raises UserError. Collective."""
    content = None
    with together():
        if is_main():
            check_writable(run, "--model_save_path")
            with disk_errors(f"--model_save_path {run}"):
                content = _lock(run)
    content = gather_objects(content)[0]
    with together():
        _check_shared(run, content)


def _check_shared(run: str, content: str) -> None:
    """Raises UserError on a rank that does not see rank 0's run.lock: every rank writes its share of checkpoints."""
    path, said, deadline = Path(run, LOCK), False, time.monotonic() + SEEN
    while not is_main() and not (path.exists() and path.read_text("utf-8") == content):
        if time.monotonic() > deadline:
            raise UserError(
                f"--model_save_path {run} is not the folder of rank 0, whose run.lock is not there; use a folder on a "
                "file system that all nodes share"
            )
        if not said:
            print(f"rank {rank()}: waiting up to {SEEN:g} s for rank 0's run.lock in {run}", flush=True)
            said = True
        time.sleep(min(1.0, SEEN))
        report_progress("wait for a shared folder")


def _lock(run: str) -> str:
    """Locks and writes run.lock; returns its content.

    `held` removes it, and folders that are created here if nothing else is in them.
    """
    path = os.path.join(run, LOCK)
    held.callback(remove_empty, os.path.abspath(run), existing_parent(run))
    os.makedirs(run, exist_ok=True)
    while True:
        file = held.enter_context(open(path, "a+", encoding="utf-8", errors="replace"))  # noqa: SIM115 - no exit but held's
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
        with contextlib.suppress(FileNotFoundError):  # its holder has just removed it
            holder = _holder(content)
            if (content and not has_locks) or (holder and holder.host != socket.gethostname()):
                _outlast(path, content)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
    now = datetime.datetime.now().isoformat(" ", "seconds")
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}) + "\n"
    file.truncate(0)
    file.write(text)
    file.flush()
    os.fsync(file)  # NFS would keep it from other nodes as long as the file is open
    if not has_locks:
        time.sleep(1.0)  # of two that take it at the same time, the last to write has it
        if (content := Path(path).read_text("utf-8")) != text:
            raise _in_use(path, content)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), name="run.lock", daemon=True).start()
    held.callback(ended.set)
    held.callback(_release, path)
    return text


def _outlast(path: str, content: str) -> None:
    """Waits until run.lock is STALE seconds old. Raises UserError if its holder touches it before."""
    touched, said = os.stat(path).st_mtime_ns, False
    while _age(path) < STALE:
        if not said:
            print(f"{_in_use(path, content)}. Waiting up to {STALE / 60:g} minutes, in case it was killed", flush=True)
            said = True
        time.sleep(min(1.0, BEAT))
        report_progress("wait for run.lock")
        if os.stat(path).st_mtime_ns != touched:
            raise _in_use(path, content)


def _release(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def _age(path: str) -> float:
    """Seconds since a file was touched, by the clock of its file system."""
    with tempfile.TemporaryFile(dir=os.path.dirname(path) or ".") as now:
        return os.fstat(now.fileno()).st_mtime - os.stat(path).st_mtime


def _beat(path: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _holder(content: str) -> Holder | None:
    try:
        return checked(Holder, json.loads(content))
    except (ValueError, RecursionError):
        return None


def _in_use(path: str, content: str) -> UserError:
    who, stop = "another process", ""
    if holder := _holder(content):
        who, stop = f"process {holder.pid} on {holder.host} since {holder.since}", f": kill {holder.pid}, on that host"
    what = f"--model_save_path {os.path.dirname(path)} is in use by {who}"
    return UserError(f"{what}; use another folder, wait for it, or stop it{stop}")
