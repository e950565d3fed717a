"""Command line of merge_weight_en.py and merge_weight_zh.py. Imports nothing heavy before the flags are parsed."""

import argparse
import re
import signal
import sys
from functools import partial
from pathlib import Path

from utils.flags.parser import FlagParser, entry_point
from utils.weight_diff.published import DTYPES, Release

_COMMANDS = {
    "recover": "Write the model --path_tuned, the sum of --path_raw and --path_diff.",
    "make_diff": "Write the weight diff --path_diff, from which --path_raw recovers --path_tuned.",
    "verify": "Check a recovered model against its manifest and the published sum.",
}
_INPUT, _OUTPUT = "a folder or a hub id", "a folder that does not exist yet"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run(release: Release, overview: str, argv: list[str] | None = None) -> None:
    """Runs the command in `argv`. A user's mistake prints one line, exit code 2. overview: the text of `--help`."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes incomplete folders
    try:
        entry_point(partial(_run, release, overview))(argv)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(release: Release, overview: str, argv: list[str] | None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    raw = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=overview, formatter_class=raw, usage="%(prog)s COMMAND [flags]")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND", help=f"one of {', '.join(_COMMANDS)}")
    command = parser.parse_args(argv[:1]).command
    flags = vars(_command_parser(command, release).parse_args(argv[1:]))
    from utils.weight_diff import recover as commands  # imports torch, which takes seconds

    getattr(commands, command)(**flags, **({} if command == "make_diff" else {"release": release}))


def _command_parser(command: str, release: Release) -> argparse.ArgumentParser:
    """Returns a parser whose flags are arguments of the function `command` in utils/weight_diff/recover.py."""
    parser = FlagParser(prog=f"{Path(sys.argv[0]).name} {command}", description=_COMMANDS[command], allow_abbrev=False)
    add, types, writes = parser.add_argument, list(release.totals), command != "verify"
    diff, tuned = (_INPUT, _OUTPUT) if command == "recover" else (_OUTPUT, _INPUT)
    if not writes:
        add("--path_tuned", required=True, help=f"the recovered model: {_INPUT}")
        text = "also check the sum published for this type; required without a manifest"
        add("--model_type", choices=types, help=text)
        return parser
    add("--path_raw", required=True, help=f"the base, {release.base}: {_INPUT}")
    add("--path_diff", required=True, help=f"the weight diff: {diff}")
    add("--path_tuned", required=True, help=f"the model: {tuned}")
    text = "type of the tuned model; selects the published sum, and whether there is a reward head"
    add("--model_type", choices=types, required=not release.default_type, default=release.default_type, help=text)
    add("--dtype", choices=DTYPES, help="dtype of the output; default: that of the input")
    text = "bytes per file, as 5GB or 500MB (%(default)s)"
    add("--max_shard_size", dest="max_shard_bytes", type=_bytes, default="2GB", help=text)
    if command == "recover":
        text = "skip the check of the sum, for a diff that is not published"
        add("--skip_sum", dest="check_sum", action="store_false", help=text)
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.upper())
    size = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if not 1 <= size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give a size like 5GB or 500MB")
    return int(size)
