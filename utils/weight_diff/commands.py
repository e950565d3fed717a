"""The command line of merge_weight_en.py and merge_weight_zh.py. Nothing heavy loads before flags are read."""

import argparse
import re
import signal
import sys
from functools import partial
from pathlib import Path

from utils.flags.parser import FlagParser, entry_point
from utils.weight_diff.published import DTYPES, Output, Release

_COMMANDS = {
    "recover": "Write the model --path_tuned, the sum of --path_raw and --path_diff.",
    "make_diff": "Write the weight diff --path_diff, with which --path_raw becomes --path_tuned.",
    "verify": "Check a recovered model against its manifest and the published sum.",
}
_PATHS = {
    "recover": ("the weight diff: a folder or a hub id", "the recovered model: a folder that does not exist yet"),
    "make_diff": ("the weight diff: a folder that does not exist yet", "the model: a folder or a hub id"),
    "verify": ("the recovered model",),
}
_MODEL_TYPE = "what the tuned model is; it decides on the published sum and whether there is a reward head"
_MODEL_TYPE_VERIFIED = "also check the sum published for this type; needed where there is no manifest"
_MOST_THREADS = 1024
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run(release: Release, overview: str, argv: list[str] | None = None) -> None:
    """Runs the command in `argv` (default: the process's). A mistake ends it with one line and exit code 2.

    overview: what `--help` without a command says.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that half a folder goes
    try:
        entry_point(partial(_run, release, overview))(argv)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(release: Release, overview: str, argv: list[str] | None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    command = _overview_parser(overview).parse_args(argv[:1]).command
    flags = _command_parser(command, release).parse_args(argv[1:])
    from utils.weight_diff import recover as commands  # and torch with it, which takes seconds

    if command == "verify":
        commands.verify(flags.path_tuned, release, flags.model_type, flags.threads)
        return
    paths = (flags.path_raw, flags.path_diff, flags.path_tuned)
    output = Output(flags.dtype, flags.max_shard_size, flags.device, flags.threads)
    if command == "recover":
        commands.recover(*paths, release, flags.model_type, output, check_sum=not flags.skip_sum)
    else:
        commands.make_diff(*paths, flags.model_type, output)


def _overview_parser(overview: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=overview, formatter_class=raw, usage="%(prog)s COMMAND [flags]")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND", help=f"one of {', '.join(_COMMANDS)}")
    return parser


def _command_parser(command: str, release: Release) -> argparse.ArgumentParser:
    script = Path(sys.argv[0]).name
    parser = FlagParser(prog=f"{script} {command}", description=_COMMANDS[command], allow_abbrev=False)
    writes = command != "verify"
    if writes:
        parser.add_argument("--path_raw", required=True, help=f"the base, {release.base}: a folder or a hub id")
        parser.add_argument("--path_diff", required=True, help=_PATHS[command][0])
    parser.add_argument("--path_tuned", required=True, help=_PATHS[command][-1])
    parser.add_argument(
        "--model_type",
        choices=list(release.totals),
        required=writes and release.default_type is None,
        default=release.default_type if writes else None,
        help=_MODEL_TYPE if writes else _MODEL_TYPE_VERIFIED,
    )
    if writes:
        _add_output_flags(parser)
    if command == "recover":
        parser.add_argument("--skip_sum", action="store_true", help="for a diff that is neither published nor ours")
    parser.add_argument(
        "--threads", type=_threads, default=1, help="CPU threads that add; reading and hashing have more"
    )
    return parser


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of what is written; default: the dtype of the input")
    parser.add_argument(
        "--max_shard_size", type=_bytes, default="2GB", help="bytes per file, as 5GB or 500MB (%(default)s)"
    )
    parser.add_argument("--device", type=_device, default="cpu", help="where tensors are added: cpu, cuda, cuda:1, ...")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?I?B?)", text.upper())
    try:
        size = int(float(match[1]) * _UNITS[match[2]])
    except (TypeError, KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a size like 5GB or 500MB")
    return size


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number, 1 to {_MOST_THREADS}")
    return int(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text}: give cpu, cuda or cuda:N")
    return text
