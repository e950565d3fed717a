"""One dataclass field -> flags of a command line. No transformers: its parser alone takes two seconds to import."""

import argparse
import dataclasses
from collections.abc import Callable
from types import NoneType
from typing import Any, Literal, get_args, get_origin

WORDS = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)


def add_field(parser: argparse.ArgumentParser, field: dataclasses.Field, text: str) -> None:
    """Adds --a_b (--a-b too) for a field of type bool, Literal, list[X], X or X | None; `text` is its help.

    Literal["auto"] | X takes that word too. A bool takes a word or stands bare; where its default is True, --no_a_b
    switches it off. A field without a default is required.
    """
    kind = _without_none(field.type)
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "type": kind, "default": default_of(field)}
    if options["default"] is dataclasses.MISSING:
        options |= {"required": True, "default": None}
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        options |= {"choices": get_args(kind), "type": lambda word: choices.get(word, word)}
    elif get_origin(kind) is list:
        options |= {"nargs": "+", "type": get_args(kind)[0]}
    elif kind is bool:
        options |= {"nargs": "?", "const": True, "type": to_bool}
    elif get_args(kind):
        words, kind = get_args(kind)
        options |= {"nargs": "?", "const": True} if kind is bool else {}
        options["type"] = _word_or(get_args(words), to_bool if kind is bool else kind)
    parser.add_argument(*_names(field.name), **options)
    if field.default is True:
        options = {"dest": field.name, "action": "store_false", "default": argparse.SUPPRESS}
        parser.add_argument(*_names(f"no_{field.name}"), **options, help=f"The opposite of --{field.name}")


def default_of(field: dataclasses.Field) -> Any:
    """The field's default value, a new one each time where it is made by a function; MISSING where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def to_bool(word: str) -> bool:
    """yes, true, t, y, 1 and their opposites, in any case."""
    if word.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"{word} is neither true nor false")
    return WORDS[word.lower()]


def _word_or(words: tuple[str, ...], kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A converter that leaves these words as they are."""

    def convert(word: str) -> Any:
        return word if word in words else kind(word)

    convert.__name__ = " or ".join([*words, kind.__name__])  # argparse names it: "invalid auto or int value"
    return convert


def _without_none(kind: Any) -> Any:
    """X of `X | None`, else the type itself."""
    kinds = [each for each in get_args(kind) if each is not NoneType]
    return kinds[0] if NoneType in get_args(kind) and len(kinds) == 1 else kind


def _names(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))
