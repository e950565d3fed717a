"""A case of the corpus, and how tables of values become cases."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostile.changes import REMOVED, Change, put

LONGEST = 40  # characters of a value in the name of a case
HUGE_FILE = 1 << 24


@dataclass(frozen=True)
class Case:
    """A command on inputs that were changed. It is refused in one line, or `accepted` says why it may go on.

    source: a name of tests/hostile/materials.py, of which the case gets a copy, `{model}`; `change` is made in it.
    flags: those that differ from tests/bad_inputs/commands.py. says: what an accepted case has to print.
    """

    command: str
    source: str
    change: Change
    flags: dict = field(default_factory=dict)
    accepted: str = ""
    says: str = ""


def shown(value) -> str:
    """A short name of a value."""
    if value is REMOVED:
        return "left out"
    text = value if isinstance(value, str) else json.dumps(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)})"


def values_of(
    name: str, table: dict[str, list], make: Callable[[Change], Case], accepted: dict[str, str] | None = None
) -> dict[str, Case]:
    """A case for each value in a JSON file. table: place -> values; accepted: "place = value" -> why that may go on."""
    found, reasons = {}, dict(accepted or {})
    for place, values in table.items():
        for value in values:
            title = f"{place or 'all'} = {shown(value)}"
            case = make(put(name, place, value))
            reason = reasons.pop(title, "")
            found[f"{name}: {title}"] = Case(**vars(case) | {"accepted": reason or case.accepted})
    assert not reasons, f"no such values: {list(reasons)}"
    return found


def contents(folder: Path) -> dict[str, tuple]:
    """Name -> what tells whether something in a folder was changed: the bytes of files, unless they are huge."""

    def state(path: Path) -> tuple:
        found = path.lstat()
        small = path.is_file() and not path.is_symlink() and found.st_size < HUGE_FILE
        return found.st_mode, path.read_bytes() if small else (found.st_size if path.is_file() else 0)

    return {str(path.relative_to(folder)): state(path) for path in folder.rglob("*")}
