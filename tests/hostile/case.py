"""A case of the corpus, and how tables of values become cases."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostile.changes import REMOVED, Change, put

FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # no terminal may see them
MEMORY = re.compile(r"can't allocate|cannot allocate|bad_alloc|os error 12", re.IGNORECASE)  # who got none says so
CODE_RAN = "ran"  # the file that hostile code would make
LONGEST = 60  # characters of a value in the name of a case
HUGE_FILE = 1 << 24


@dataclass(frozen=True)
class Case:
    """A command on inputs that were changed. It is refused in one line, or `accepted` says why it may go on.

    source: a name of tests/hostile/materials.py, of which the case gets a copy ("": an empty folder); `change` is made
    in it, and flags call it {model}. flags: those that differ from tests/bad_inputs/commands.py. says: what an accepted
    case has to print.
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
    """A case for each value in a JSON file. table: place -> values; accepted: why some may go on.

    That is by "place = value", or by the beginning of it and "…".
    """
    found, known = {}, dict(accepted or {})
    for place, values in table.items():
        for value in values:
            title = f"{place or 'all'} = {shown(value)}"
            case = make(put(name, place, value))
            key = next((key for key in known if title == key or (key[-1:] == "…" and title.startswith(key[:-1]))), None)
            reason = known.pop(key, "")
            found[f"{name}: {title}"] = Case(**vars(case) | {"accepted": reason or case.accepted})
    assert not known, f"no such values: {list(known)}"
    return found


def named(pattern: str, table: dict, make: Callable[..., Case], accepted: str | dict[str, str] = "") -> dict[str, Case]:
    """A case for each entry of a table: its title in the pattern -> make(entry). accepted: why, of all or by title."""
    reasons = accepted if isinstance(accepted, dict) else dict.fromkeys(table, accepted)
    assert reasons.keys() <= table.keys()
    return {pattern.format(title): make(value, accepted=reasons.get(title, "")) for title, value in table.items()}


def some(table: dict, *titles: str) -> dict:
    """The entries with these titles."""
    return {title: table[title] for title in titles}


def contents(folder: Path) -> dict[str, tuple]:
    """Name -> what tells whether something in a folder was changed: the bytes of files, unless they are huge."""

    def state(path: Path) -> tuple:
        found = path.lstat()
        small = path.is_file() and not path.is_symlink() and found.st_size < HUGE_FILE
        return found.st_mode, path.read_bytes() if small else (found.st_size if path.is_file() else 0)

    return {str(path.relative_to(folder)): state(path) for path in folder.rglob("*")}


def problem(case: Case, outcome: dict, limit: int) -> str | None:
    """What is wrong with the way in which a case has ended, or None. limit: bytes. outcome: of tests/hostile/run.py."""
    log, code = outcome["log"], outcome["code"]
    errors = re.findall(r"(?:^|[\r\n])error: ([^\n]*)(?=\n)", log)
    checks = {
        f"hung, or ended with code {code}": code in (0, 2),
        "a traceback": "Traceback" not in log,
        f"{outcome['bytes'] / 1e6:.0f} MB": outcome["bytes"] <= limit,
        "asked for more memory than there is": code == 0 or not MEMORY.search(log),
        "code ran": not any(name.split("/")[-1] == CODE_RAN for name in outcome["changed"]),
        "control characters": not FORBIDDEN.search(log),
    }
    if code == 2:
        names = [word for word in outcome["argv"] if word.startswith("/")]
        line = errors[-1] if errors else ""
        checks |= {
            "not one line": len(errors) == 1 and log.endswith(f"error: {line}\n"),
            "names neither flag nor file": re.search(r"--\w+", line) or any(name in line for name in names),
            "refused, but legitimate": not case.says or not case.accepted,
            f"changed {outcome['changed'][:3]}": not outcome["changed"],
        }
    elif code == 0:
        checks |= {"taken in silence": case.accepted != "", f"does not say {case.says!r}": case.says in log}
    return next((f"{text}: {log[-600:]}" for text, fine in checks.items() if not fine), None)
