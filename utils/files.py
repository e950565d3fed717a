"""Atomic writes of files and folders, JSON files, and checks of output paths. Imports nothing heavy."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from safetensors import SafetensorError

from utils.errors import UserError
from utils.terminal import printable
from utils.watchdog import report_progress

MAX_JSON = 1 << 26  # bytes: 64 MB, twice the largest tokenizer.json of published models
MAX_DEPTH = 100  # of JSON; Python's own limit differs between versions, and copying a value needs several calls a level

MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes of this machine
ASIDE = ".old.partial"  # end of the name of a folder that is being replaced


def open_regular(file: str | Path) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError, also for pipes and devices, on which a read could wait."""
    stream = open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return stream


def read_bytes(file: str | Path, limit: int = MEMORY) -> bytes:
    """Returns the content of a regular file. Raises OSError; ValueError beyond `limit` bytes."""
    with open_regular(file) as stream:
        if os.fstat(stream.fileno()).st_size > limit:
            raise ValueError(f"it has more than {limit >> 20} MB")
        return stream.read()


def sha256(file: str | Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    report_progress(f"hash of {os.path.basename(file)}")
    return digest.hexdigest()


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text. Raises ValueError, also for deep nesting, lone surrogates and huge integers."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [value], 0
    while level := [x for item in level for x in _items(item) if isinstance(x, (dict, list))]:
        depth += 1
        if depth >= MAX_DEPTH:
            raise ValueError("nested too deeply")
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # raises UnicodeEncodeError, a ValueError
    return value


def _items(value: Any):
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_json(file: str | Path, flag: str = "", kind: type | None = None) -> dict:
    """Returns the object in a JSON file. Raises OSError or ValueError, which names it; with `flag`, a UserError.

    kind: a model of utils/schema.py that the object has to fit.
    """
    try:
        content = parse_json(read_bytes(file, MAX_JSON).decode("utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        if kind:
            from utils.schema import checked  # imports pydantic

            checked(kind, content)
    except (OSError, ValueError) as error:
        if not flag:
            raise error if isinstance(error, OSError) else ValueError(f"{Path(file).name}: {error}") from None
        raise UserError(f"{flag}: {file} is damaged or not readable ({error}); copy it again") from error
    return content


def parse_row(line: bytes) -> dict | None:
    """Returns a line of metrics.jsonl or samples.jsonl; None for a foreign one: not an object with a whole `step`."""
    try:
        row = parse_json(line.decode())
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53 else None


def write_json(path: str, content, flag: str = "") -> None:
    """Writes a value as JSON, as `atomic_file` does."""
    with atomic_file(path, flag) as file:
        file.write(json_text(content))


def json_text(content) -> str:
    """Returns a value as the text of a JSON file, with control characters escaped."""
    return printable(json.dumps(content, indent=2, ensure_ascii=False)) + "\n"


def first_names(names: list[str], limit: int = 5) -> str:
    """Returns the first `limit` names and the number of the others, as "a, b, c and 7 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_writable(path: str, flag: str) -> None:
    """Raises UserError if no folder can be created at the `path` of `flag`. Writes nothing."""
    parent = existing_parent(path)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written: {parent} is not a writable folder; use another path")


def check_output_file(path: str, flag: str) -> None:
    """Raises UserError if no file can be written at the `path` of `flag`. Writes nothing."""
    if is_special(path):
        return
    check_writable(os.path.dirname(os.path.abspath(path)), flag)
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a folder; pass the name of a file")


def existing_parent(path: str) -> str:
    """Returns `path`, or the innermost folder above it that exists."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def is_special(path: str) -> bool:
    """Whether `path` is, or links to, a device or a pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextlib.contextmanager
def disk_errors(what: str, advice: str = "free disk space, or use another path") -> Iterator[None]:
    """Context in which an error of the disk becomes a UserError: `what` cannot be written, the reason, `advice`."""
    try:
        yield
    except Exception as error:
        tokenizers = type(error) is Exception and "(os error " in str(error)  # that library has no exception of its own
        if not tokenizers and not isinstance(error, (OSError, SafetensorError)):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} cannot be written: {reason}; {advice}") from error


@contextlib.contextmanager
def atomic_file(path: str, flag: str = "") -> Iterator[IO[str]]:
    """Yields a text file that replaces `path` if the block succeeds, and is removed if it fails. Call it on one rank.

    Creates missing folders, follows a symbolic link, and writes directly to a device or pipe. Raises UserError, which
    names `flag`, for an error of the disk.
    """
    with disk_errors(f"{flag} {path}".lstrip()):
        if is_special(path):
            with open(path, "w", encoding="utf-8") as file:
                yield file
            return
        path = os.path.realpath(path)
        folder, partial = os.path.dirname(path), f"{path}.partial"
        existing = existing_parent(folder)
        os.makedirs(folder, exist_ok=True)
        try:
            with open(partial, "w", encoding="utf-8") as file:
                yield file
            replace(partial, path)
        finally:
            remove(partial)
            remove_empty(folder, existing)


@contextlib.contextmanager
def atomic_folder(path: str, flag: str = "") -> Iterator[str]:
    """Yields a folder that replaces `path` if the block succeeds. Call it on one rank. Raises UserError."""
    partial = f"{os.path.abspath(path)}.partial"
    with disk_errors(f"{flag} {path}".lstrip()):
        recover(os.path.abspath(path))
        remove(partial)
        try:
            os.makedirs(partial)
            yield partial
            for folder, folders, files in os.walk(partial):
                for name in folders + files:
                    sync(os.path.join(folder, name))
            replace(partial, os.path.abspath(path))
        finally:
            remove(partial)


def replace(partial: str, path: str) -> None:
    """Renames a file, or a folder of synced files, to `path`: waits until the content is on the disk, then the name.

    A folder that has this name is set aside first and removed last: after a kill, `recover` finds it or the new one.
    """
    sync(partial)
    is_folder = os.path.isdir(partial)
    if is_folder:
        recover(path)
        if os.path.lexists(path):
            os.rename(path, path + ASIDE)
    os.replace(partial, path)
    sync(os.path.dirname(path))
    if is_folder:
        remove(path + ASIDE)


def recover(path: str) -> None:
    """Completes what a killed `replace` of a folder began: its old content comes back unless the new one is there."""
    if os.path.lexists(path):
        remove(path + ASIDE)
    elif os.path.lexists(path + ASIDE):
        os.rename(path + ASIDE, path)


def sync(path: str) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: str) -> None:
    """Removes a file, a link or a whole folder, if it exists."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def remove_empty(folder: str, existing: str) -> None:
    """Removes `folder` and the folders above it, below `existing`, up to the first one that holds something."""
    with contextlib.suppress(OSError):
        while folder != existing:
            os.rmdir(folder)
            folder = os.path.dirname(folder)
