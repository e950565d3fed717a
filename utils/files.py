"""Reads JSON files, waits for the disk, and names things in error messages. Imports nothing heavy."""

import json
import os
from pathlib import Path

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
