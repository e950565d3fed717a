"""Flags: one dataclass becomes a command line. A docstring under each field is its `--help` text.

Light on purpose (no torch, no deepspeed): a wrong flag is reported in under a second.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import os
import shlex
import sys
import textwrap
from typing import TypeVar

from utils.errors import UserError
from utils.flags.fields import add_field, default_of

Config = TypeVar("Config")


def field_help(config_type: type) -> dict[str, str]:
    """Field name -> the docstring under it, over the class and its bases; read from the source."""
    texts: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are UserErrors."""

    def error(self, message: str):
        """What argparse calls instead of returning."""
        raise UserError(f"{message}{_suggestion(message, self)} (see --help)")


def build_parser(config_type: type) -> argparse.ArgumentParser:
    """A parser for the dataclass: no abbreviations, help from field docstrings, mistakes as UserError."""
    formatter, description = argparse.ArgumentDefaultsHelpFormatter, (config_type.__doc__ or "").split("\n")[0]
    parser = FlagParser(allow_abbrev=False, description=description, formatter_class=formatter)
    help_texts = field_help(config_type)
    for field in dataclasses.fields(config_type):
        add_field(parser, field, help_texts.get(field.name, ""))
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers append it
    return parser


def _suggestion(message: str, parser: argparse.ArgumentParser) -> str:
    if not message.startswith("unrecognized"):
        return ""
    unknown = next((word.split("=")[0] for word in message.split() if word.startswith("--")), "")
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(unknown, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def given_flags(parser: argparse.ArgumentParser, argv: list[str]) -> dict:
    """The flags that stand on the command line, without any default."""
    defaults = {action: action.default for action in parser._actions}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv, argparse.Namespace()))
    for action, default in defaults.items():
        action.default = default
    return given


def parse_args(
    config_type: type[Config],
    argv: list[str] | None = None,
    presets: dict[str, dict] | None = None,
    amounts: dict[str, str] | None = None,
) -> Config:
    """Command line -> config. Explicit flags win over `--preset`, which wins over field defaults.

    presets: name -> {field: value}. amounts: switch -> its amount, {"use_x": "x"}: an explicit amount of 0 switches
    off a `use_x` that only the preset had set; an explicit `--use_x` with amount 0 is left for the config to refuse.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(config_type)
    parser._defaults = {}
    if any(word in ("-h", "--help") for word in argv):
        parser.parse_args(argv)
    optional = {action.dest: action.required for action in parser._actions}
    for action in parser._actions:
        action.required = False
    given = given_flags(parser, argv)
    for action in parser._actions:
        action.required = optional[action.dest]
    if presets:
        preset = given.get("preset", next(f.default for f in dataclasses.fields(config_type) if f.name == "preset"))
        values = dict(presets[preset])
        for switch, amount in (amounts or {}).items():
            if given.get(amount) == 0 and switch not in given:
                values[switch] = False
        parser.set_defaults(**values)
    arguments = vars(parser.parse_args(argv))
    arguments.pop("local_rank")
    return config_type(**arguments)


def changed_flags(config) -> str:
    """The flags whose values are not those of the defaults or the preset, as they may be pasted behind the command."""
    words = []
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if value == config.preset_values.get(name, default_of(field)):
            continue
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return shlex.join(words)


def entry_point(main):
    """For `main(argv=None)`: a UserError becomes one line and exit code 2, Ctrl-C one line and 130; bugs show."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        os.umask(os.umask(0o777) | 0o002)  # nothing that is written may be changed by everyone
        if isinstance(sys.stdout, io.TextIOWrapper):  # what is said is read at once behind a pipe too, and after a kill
            sys.stdout.reconfigure(line_buffering=True)
        where = f" [rank {os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        try:
            return main(argv)
        except UserError as error:
            text = " ".join(str(error).splitlines())  # a path may hold anything
            print(f"error{where}: {text}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"stopped by Ctrl-C{where}", file=sys.stderr, flush=True)
            sys.exit(130)

    return run
