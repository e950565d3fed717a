"""A dataclass of flags becomes a command line; a wrong flag is reported before torch is imported."""

import argparse
import dataclasses
import functools
import os
import re
import shlex
import sys
import time
import traceback
from typing import Any, NoReturn, TypeVar

from utils.errors import LINGER, HungError, SharedError, UserError, problem_of
from utils.flags.config_file import read_config_file
from utils.flags.fields import add_field, default_of
from utils.flags.help import show_help
from utils.flags.other_names import explain_unknown
from utils.notices import end_notices, notices
from utils.slurm import rank_variables
from utils.terminal import has_lone_surrogate, protect_streams

Config = TypeVar("Config")


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse exits."""
        flag = re.match(r"argument --(\w+)", message)
        raise UserError(f"{message.removeprefix('argument ')} (see --help{f' {flag[1]}' if flag else ''})")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As argparse's. The error for an unknown flag names the flag that was probably meant."""
        args = list(sys.argv[1:] if args is None else args)
        for word in args:  # the run's files name it in UTF-8, and no file system takes a null
            if "\0" in word or has_lone_surrogate(word):
                raise UserError(
                    f"{word!r} on the command line, or in --config, is not UTF-8; change it, or rename the file"
                )
        known = {name.removeprefix("--") for action in self._actions for name in action.option_strings}
        names = {word: word.split("=")[0].removeprefix("--") for word in args if word.startswith("--")}
        values, unknown = None, [word for word, name in names.items() if name not in known and " " not in name]
        if not unknown:  # else argparse would name missing flags first
            values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UserError(explain_unknown(unknown, known))
        return values


def build_parser(config_type: type) -> FlagParser:
    """A parser for the fields of the dataclass. It returns only the flags that are given, without any default."""
    parser = FlagParser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    aliases = getattr(config_type, "aliases", {})
    for field in dataclasses.fields(config_type):
        add_field(parser, field, *(other for other, name in aliases.items() if name == field.name))
    parser.add_argument("--config")
    parser.add_argument("--local_rank", type=int)  # launchers append it
    return parser


def parse_args(
    config_type: type[Config], argv: list[str] | None = None, presets: dict[str, dict] | None = None,
    amounts: dict[str, str] | None = None,
) -> Config:  # fmt: skip
    """Command line -> config. Flags win over `--config`, which wins over `--preset`, which wins over field defaults.

    presets: name -> {field: value}. amounts: switch -> its amount, {"use_x": "x"}: an explicit amount of 0 switches off
    a `use_x` that only the preset had set. The config's attribute `given` names the flags whose values the user chose.
    """
    given, chosen = read_values(config_type, list(sys.argv[1:] if argv is None else argv), presets)
    values = {}
    if presets:
        values |= presets[given.get("preset", config_type.preset)]
        values |= {switch: False for switch, amount in (amounts or {}).items() if given.get(amount) == 0}
    config = config_type.__new__(config_type)
    config.given = chosen  # before __init__, whose checks ask for it
    config.__init__(**values | given)
    return config


def read_values(
    config_type: type, argv: list[str], presets: dict[str, dict] | None = None
) -> tuple[dict[str, Any], frozenset[str]]:  # fmt: skip
    """Returns (flag -> value, the flags that the user chose) of a command line and its --config, without any checks.

    Shows the help and exits if the command line asks for it.
    """
    for place, word in enumerate(argv):
        if word in ("-h", "--help"):
            show_help(config_type, (argv[place + 1 :] or [""])[0])
            sys.exit(0)
    parser = build_parser(config_type)
    given = vars(parser.parse_args(argv))
    given.pop("local_rank", None)
    chosen = set(given)
    if path := given.pop("config", None):
        names = {field.name for field in dataclasses.fields(config_type)} | getattr(config_type, "aliases", {}).keys()
        values, of_file = read_config_file(path, lambda words: vars(parser.parse_args(words)), names)
        if presets and values.get("preset") not in (None, given.get("preset", values.get("preset"))):
            _check_preset(given["preset"], presets, path, values.keys() - given.keys())
        given, chosen = values | given, chosen | of_file
    return given, frozenset(chosen)


def _check_preset(preset: str, presets: dict[str, dict], path: str, of_file: set[str]) -> None:
    """Raises UserError if a file made with another preset sets flags of presets, which then win over `preset`."""
    if names := sorted(of_file & set().union(*presets.values())):
        raise UserError(
            f"--preset {preset} has no effect on --{', --'.join(names)}: --config {path}, of another preset, has them; "
            "remove them and preset from a copy of it, or pass the flags that should differ"
        )


def changed_defaults(config) -> dict[str, Any]:
    """The flags whose values are not those of the defaults or the preset -> that default."""
    defaults = {field.name: default_of(field) for field in dataclasses.fields(config)} | config.preset_values
    return {name: default for name, default in defaults.items() if getattr(config, name) != default}


def changed_flags(config) -> str:
    """The flags of `changed_defaults`, as they can be appended to the command."""
    words = []
    for name in changed_defaults(config):
        value = getattr(config, name)
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return shlex.join(words)


def entry_point(main):
    """For `main(argv=None)`: a UserError becomes one line (--debug: and a traceback) and exit code 2, Ctrl-C 130."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        os.umask(os.umask(0o777) | 0o002)  # nothing that is written may be changed by everyone
        protect_streams()
        os.environ.update(rank_variables(os.environ))
        # Fewer gaps in GPU memory. vLLM 0.32 turns it off where it allocates what sleep frees, which it would break:
        # CuMemAllocator.use_memory_pool in vllm/device_allocator/cumem.py.
        if "PYTORCH_ALLOC_CONF" not in os.environ:  # torch prefers the older name if both are set
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        where = f" [rank {os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        argv = list(sys.argv[1:] if argv is None else argv)
        try:
            with notices():
                return main([word for word in argv if word != "--debug"])
        except Exception as error:
            if (text := problem_of(error)) is None:
                if not where:
                    raise
                traceback.print_exc()
                _exit(1, is_alone=False)
            if "--debug" in argv:
                traceback.print_exc()
            is_shared = isinstance(error, SharedError)
            if not (is_shared and error.is_silent):
                print(f"error{where}: {text}", file=sys.stderr, flush=True)
            if is_shared:
                time.sleep(LINGER)
            _exit(2, is_alone=not where and not isinstance(error, HungError))
        except KeyboardInterrupt:
            print(f"stopped by Ctrl-C{where}", file=sys.stderr, flush=True)
            _exit(130, is_alone=not where)
        finally:
            end_notices()

    return run


def _exit(code: int, is_alone: bool) -> NoReturn:
    """Exits. Unless alone, without destructors, in which gloo aborts if another rank is gone, or threads may hang."""
    if is_alone:
        sys.exit(code)
    end_notices()
    sys.stdout.flush()
    os._exit(code)
