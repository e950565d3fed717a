"""Reads JSON files, waits for the disk, and names things in error messages. Imports nothing heavy."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from utils.errors import UserError


def read_json(file: Path, flag: str) -> dict:
    """Returns the object in a JSON file. UserError, naming `flag`, when it cannot be read or is something else."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {file} is not readable or damaged ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{flag}: {file} is damaged (not a JSON object); copy it again")
    return content


def first_names(names: list[str], limit: int = 5) -> str:
    """Returns the first names in words, and how many more there are: `a, b, c and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def sync(path: str | Path) -> None:
    """Waits until a file's content or a folder's names are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: str, flag: str) -> None:
    """Raises UserError when no folder can be made at the `path` of `flag`. Changes nothing."""
    parent = os.path.abspath(path)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written: {parent} is not a writable folder; choose another place")


def check_output_file(path: str, flag: str) -> None:
    """Raises UserError when no file can be written at the `path` of `flag`. Changes nothing."""
    if _is_special(path):
        return
    check_writable(os.path.dirname(os.path.abspath(path)), flag)
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a folder: give the name of a file")


def _is_special(path: str) -> bool:
    """Whether something is there, or where a link points to, that is no file and no folder: a device, a pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def write_json(path: str, content) -> None:
    """Writes beside and renames, so that a reader never sees half a file. Makes the folder where there is none."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        _dump(content, file)
    os.replace(f"{path}.partial", path)


def write_result(path: str, flag: str, content) -> None:
    """The JSON file that the user asked for by `flag`, as `atomic_file` writes."""
    with atomic_file(path, flag) as file:
        _dump(content, file)


def _dump(content, file: IO[str]) -> None:
    json.dump(content, file, indent=2, ensure_ascii=False)
    file.write("\n")


@contextlib.contextmanager
def atomic_file(path: str, flag: str) -> Iterator[IO[str]]:
    """Yields a text file to write to beside `path`, which takes its place when the block ends well, else goes.

    A link stays one, and what it points to is replaced; a device or pipe is written to as it is. Call it on one rank. A
    write error becomes a UserError that names `flag` and the path.
    """
    try:
        if _is_special(path):
            with open(path, "w", encoding="utf-8") as file:
                yield file
        else:
            with _file_beside(os.path.realpath(path), flag) as file:
                yield file
    except OSError as error:
        problem = error.strerror or error
        raise UserError(f"{flag} {path} cannot be written: {problem}; choose another place, or free the disk") from None


@contextlib.contextmanager
def _file_beside(path: str, flag: str) -> Iterator[IO[str]]:
    folder, partial = os.path.dirname(path), f"{path}.partial"
    check_writable(folder, flag)
    new = missing_folders(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        remove(partial)
        for made in new:
            with contextlib.suppress(OSError):  # it holds something now
                os.rmdir(made)


def missing_folders(path: str) -> list[str]:
    """The folders that `os.makedirs` would make, the innermost first."""
    missing = []
    while not os.path.exists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """Yields a new folder beside `path` that takes its place when the block ends well, and goes when it does not.

    Call it on one rank. A write error becomes a UserError that names the folder.
    """
    partial = f"{os.path.abspath(path)}.partial"
    remove(partial)
    try:
        os.makedirs(partial)
        yield partial
        remove(path)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        remove(partial)


def remove(path: str) -> None:
    """Removes a file, a link or a whole folder, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)
