"""What `--help`, `--help all` and `--help WORD` print. Texts are the docstrings under the fields, read from source."""

import ast
import dataclasses
import inspect
import itertools
import re
import shutil
import sys
import textwrap
from pathlib import Path

from utils.errors import UserError
from utils.flags.fields import default_of, is_common, values_of
from utils.flags.other_names import explain_unknown

OTHERS = {
    "config": ("FILE", "YAML or JSON file with values of flags, such as the config.json of a run; flags on the command "
               "line win over it"),
    "debug": ("", "Show the traceback of an error in flags, files or data too"),
    "help": ("[FLAG|WORD|all]", "List the flags that most people use, explain one flag, list those with WORD in their "
             "name, or list all"),
}  # fmt: skip


def field_help(config_type: type) -> dict[str, str]:
    """Field name -> the docstring under it, over the class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def groups_of(config_type: type) -> dict[str, list[dataclasses.Field]]:
    """Heading -> fields, in order. A heading is the docstring, up to the colon, of the class that declares a field."""
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    groups: dict[str, list[dataclasses.Field]] = {}
    for base in config_type.__mro__:
        heading = "This command" if base is config_type else (base.__doc__ or "").split(":")[0]
        for name in getattr(base, "__annotations__", {}):
            if name in fields and _home(config_type, name) is base:
                groups.setdefault(heading, []).append(fields[name])
    return groups


def show_help(config_type: type, topic: str) -> None:
    """Prints the help of a command. topic: "", "all", a flag, or part of the names of flags."""
    name = topic.removeprefix("--")
    fields = {field.name for field in dataclasses.fields(config_type)}
    if name in OTHERS:
        print(f"--{name} {OTHERS[name][0]}\n{_wrapped(OTHERS[name][1])}")
    elif name in fields:
        print(explain(config_type, name))
    elif name in ("", "all"):
        print(overview(config_type, every=name == "all"))
    elif found := [field for field in dataclasses.fields(config_type) if name in field.name]:
        print("\n".join([f"flags with {name} in their name", *_entries(config_type, found)]))
    else:
        raise UserError(explain_unknown([f"--{name}"], fields | set(OTHERS)))


def overview(config_type: type, every: bool) -> str:
    """All flags of a command by group, or those that most people use: the first sentence and the default of each."""
    count, shown = 0, 0
    needed = "".join(f"--{name} ... " for name in config_type.required if not getattr(config_type, name, None))
    lines = [f"usage: {program()} {needed}[flags]", "", inspect.getdoc(config_type) or ""]
    for heading, fields in groups_of(config_type).items():
        listed = [field for field in fields if every or is_common(field)]
        count, shown = count + len(fields), shown + len(listed)
        lines += ["", heading] if listed else []
        lines += _entries(config_type, listed)
    lines += ["", "General"]
    lines += [f"  --{name} {takes}".rstrip() + f"\n{_wrapped(text, 6)}" for name, (takes, text) in OTHERS.items()]
    if shown < count:
        lines += ["", f"These are {shown} of {count} flags. --help all lists all of them."]
    if any("Part I" in line for line in lines):
        lines += ["", "Part I: arXiv 2307.04964. Part II: arXiv 2401.06080."]
    return "\n".join(lines)


def _entries(config_type: type, fields: list[dataclasses.Field]) -> list[str]:
    texts, lines = field_help(config_type), []
    for field in fields:
        lines += [f"  {_title(config_type, field)}", _wrapped(_sentence(texts[field.name]), 6)]
    return lines


def _sentence(text: str) -> str:
    return re.split(r"(?<!\.)\.(?: (?=[A-Z])|$)", text)[0]  # an ellipsis ends no sentence


def explain(config_type: type, name: str) -> str:
    """All that is known about one flag."""
    field = next(field for field in dataclasses.fields(config_type) if field.name == name)
    group = next(heading for heading, fields in groups_of(config_type).items() if field in fields)
    return f"{_title(config_type, field)}\n  group: {group}\n{_wrapped(field_help(config_type)[name])}"


def program() -> str:
    """How the command was started: "python train_ppo.py" or "python -m sft.train"."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name}" if spec else f"python {Path(sys.argv[0]).name}"


def _title(config_type: type, field: dataclasses.Field) -> str:
    default = default_of(field)
    required = field.name in config_type.required and not default
    default = str(default).lower() if isinstance(default, bool) else default
    if default in (None, [], ""):  # the text says what is computed in place of it
        default = _sentence(field_help(config_type)[field.name].partition("Default: ")[2]) or "none"
    return f"--{field.name} {values_of(field)}  ({'required' if required else f'default: {default}'})"


def _home(config_type: type, name: str) -> type:
    return next(base for base in reversed(config_type.__mro__) if name in getattr(base, "__annotations__", {}))


def _wrapped(text: str, indent: int = 2) -> str:
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    return textwrap.fill(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
