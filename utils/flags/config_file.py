"""Values of flags from a YAML or JSON file, such as the config.json that a run writes."""

import re
from collections.abc import Callable
from datetime import date
from typing import Any

from utils.errors import UserError
from utils.files import parse_json, read_bytes
from utils.flags.other_names import explain_unknown

# Keys of a run's config.json that are no flags (utils/run/folder.py writes them), and flags about that run's start.
RECORD = (
    "argv", "versions", "git_commit", "code", "inputs", "devices", "world_size", "threads", "resumed_from_step",
    "replaced_defaults", "changed_flags",
)  # fmt: skip
_TAGS = (AttributeError, IndexError, KeyError, RecursionError, TypeError)  # PyYAML's for a wrong `!!tag`, or deep lists
STARTS = ("overwrite", "resume", "resume_with_changes", "notify_url", "push_to_hub", "hub_private", "run_name")


def read_config_file(path: str, parse: Callable[[list[str]], dict], known: set[str]) -> tuple[dict[str, Any], set[str]]:
    """Returns (flag -> value, the flags that a user chose); none are known to be chosen in the config.json of a run.

    parse: a command line -> values by flag; known: names of flags. null stands for the default. Raises UserError, with
    file and line, for keys that are no flags and for values that a flag does not take.
    """
    values, text = load_flags(path)
    is_record = "argv" in values and "versions" in values
    given = {}
    for key, value in values.items():
        if value in (None, []) or (is_record and key in (*RECORD, *STARTS)):
            continue
        try:
            if not all(isinstance(x, (str, int, float, date)) for x in (value if isinstance(value, list) else [value])):
                raise UserError(f"--{key} is neither a value nor a list of values; write it as on the command line")
            if key not in known:
                raise UserError(explain_unknown([f"--{key}"], known))
            given |= parse([f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"])
        except UserError as error:
            if is_record and key not in known:
                argv = values["argv"]
                program = "/".join(str(argv[0] if argv and isinstance(argv, list) else argv).split("/")[-2:])
                error = f"this is the config.json of another command or version ({program}): {error}"
            found = re.search(rf"^[ \t{{]*[\"']?{re.escape(str(key))}[\"']?\s*:", text, re.MULTILINE)
            line = text.count("\n", 0, found.start(0) + len(found[0])) + 1 if found else 1
            raise UserError(f"--config {path}:{line}: {error}") from None
    return given, set() if is_record else set(given)


def load_flags(path: str) -> tuple[dict, str]:
    """Returns (keys and values, text) of a file of flags, as they stand there. Raises UserError."""
    import yaml

    try:
        text = read_bytes(path, 1 << 20).decode("utf-8-sig")
        values = parse_json(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, *_TAGS) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} cannot be read ({reason}); pass a YAML or JSON file of flags") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} holds no flags; write a line `flag: value` for each")
    return values, text
