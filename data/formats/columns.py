"""What the flags say about the form of records: --columns, --prompt_template, --preferred_by and --reasoning."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from data.formats.records import SEEN, BadRecord
from utils.flags.data import FIELD

_FIELD = re.compile(r"\\\\n|\\n|\{\{|\}\}|" + FIELD)
_ESCAPES = {r"\\n": r"\n", r"\n": "\n", "{{": "{", "}}": "}"}
_NO_VALUE = object()


@dataclass(frozen=True)
class FormOptions:
    """Values of --columns ((our name, their name), …), --prompt_template, --preferred_by and --reasoning."""

    columns: tuple[tuple[str, str], ...] = ()
    prompt_template: str = ""
    preferred_by: str = "better"
    reasoning: str = "keep"

    def mapped(self) -> set[str]:
        """Returns the names of columns that the flags fill."""
        return {ours for ours, _ in self.columns} | ({"prompt"} if self.prompt_template else set())


PLAIN = FormOptions()


def map_columns(value: Any, options: FormOptions) -> Any:
    """Returns the record with its columns renamed by --columns and the prompt of --prompt_template.

    A renamed column is no longer there under its own name. Raises BadRecord if the record lacks a named column.
    """
    if not options.columns and not options.prompt_template:
        return value
    if not isinstance(value, dict):
        flag = "--columns" if options.columns else "--prompt_template"
        raise BadRecord(f"{flag} needs records with columns (JSON objects)")
    found = {ours: find_column(value, theirs) for ours, theirs in options.columns}
    for ours, theirs in options.columns:
        if found[ours] is _NO_VALUE:
            raise BadRecord(f"no column {theirs}, which --columns {ours}={theirs} names{_seen(value)}")
    moved = {theirs for _, theirs in options.columns}
    mapped = {key: item for key, item in value.items() if key not in moved} | found
    if options.prompt_template:
        mapped["prompt"] = _fill(options.prompt_template, value | found)
    return mapped


@cache
def named_columns(options: FormOptions) -> set[str]:
    """Returns the records' own columns that --columns and --prompt_template name, without the rest of a path."""
    fields = [field for field in _FIELD.findall(options.prompt_template) if field]
    return {name.split(".")[0] for name in [*(theirs for _, theirs in options.columns), *fields]}


def find_column(value: Any, path: str) -> Any:
    """Returns the column with this name, or what a path such as "data.question" or "choices.0" leads to."""
    if isinstance(value, dict) and path in value:
        return value[path]
    for key in path.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key[:9]) < len(value):
            value = value[int(key[:9])]
        else:
            return _NO_VALUE
    return value


def shown_name(name: str) -> str:
    """Returns a column's name for a message: at most 40 characters, control characters escaped."""
    return name[:40] if name.isprintable() else ascii(name[:40])[1:-1]


def _seen(value: dict) -> str:
    """Returns the columns that a record has, as the part of a reason that is shown once."""
    return f"{SEEN}{', '.join([shown_name(str(key)) for key in value][:12])} (--columns ours=theirs)"


def first_key(value: dict, keys: Iterable[str]) -> str | None:
    """Returns the first of the keys that has a value other than null; None if there is none."""
    return next((key for key in keys if value.get(key) is not None), None)


def _fill(template: str, value: dict) -> str:
    """Returns the template with each {column} replaced. {{ and }} stand for braces, \\n for a line break."""

    def text_of(field: re.Match) -> str:
        if field[1] is None:
            return _ESCAPES[field[0]]
        found = find_column(value, field[1])
        if found is _NO_VALUE or found is None:
            raise BadRecord(f"no column {field[1]}, which --prompt_template names{_seen(value)}")
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)

    return _FIELD.sub(text_of, template)
