"""One dataclass field as a command-line flag. No torch: help and wrong flags are answered in under a second."""

import argparse
import dataclasses
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

Type = TypeVar("Type")
Common = Annotated[Type, "common"]  # `lr: Common[float]` is a flag that --help lists; others are in --help all

WORDS = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)
NAMES = {str: "TEXT", int: "INT", float: "FLOAT", bool: "true|false"}


def is_common(field: dataclasses.Field) -> bool:
    """Whether `--help` lists the flag."""
    return get_origin(field.type) is Annotated


def type_of(field: dataclasses.Field) -> Any:
    """X of a field of type X, X | None, Common[X] or Common[X | None]."""
    kind = get_args(field.type)[0] if is_common(field) else field.type
    kinds = [each for each in get_args(kind) if each is not NoneType]
    return kinds[0] if NoneType in get_args(kind) and len(kinds) == 1 else kind


def default_of(field: dataclasses.Field) -> Any:
    """The field's default value; a new one at each call where a function makes it."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def add_field(parser: argparse.ArgumentParser, field: dataclasses.Field, *others: str) -> None:
    """Adds the flag of a field of type bool, int, float, str, Literal, list[X] or Literal["auto"] | X.

    others: more names of the flag.
    """
    kind = type_of(field)
    options: dict[str, Any] = {"type": kind}
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        options = {"choices": get_args(kind), "type": lambda word: choices.get(word, word)}
    elif get_origin(kind) is list:
        options = {"nargs": "+", "type": get_args(kind)[0]}
    elif kind is bool:
        options = {"nargs": "?", "const": True, "type": to_bool}
    elif get_args(kind):
        words, kind = get_args(kind)
        options = {"nargs": "?", "const": True} if kind is bool else {}
        options["type"] = _word_or(get_args(words), to_bool if kind is bool else kind)
    parser.add_argument(*(f"--{name}" for name in (field.name, *others)), **options)


def values_of(field: dataclasses.Field) -> str:
    """What the flag takes, for help: "FLOAT", "k1|k2|k3", "auto|INT", "TEXT ..."."""
    kind = type_of(field)
    if get_origin(kind) is list:
        return f"{NAMES[get_args(kind)[0]]} ..."
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_args(kind):
        words, kind = get_args(kind)
        return "|".join([*get_args(words), NAMES[kind]])
    return NAMES[kind]


def to_bool(word: str) -> bool:
    """yes, true, t, y, 1 and their opposites, in any case."""
    if word.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"{word} is neither true nor false")
    return WORDS[word.lower()]


def _word_or(words: tuple[str, ...], kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A converter that leaves these words as they are."""

    def convert(word: str) -> Any:
        return word if word in words else kind(word)

    convert.__name__ = " or ".join([*words, kind.__name__])  # for argparse's message: "invalid auto or int value"
    return convert
