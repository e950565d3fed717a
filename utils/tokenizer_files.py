"""Reads the JSON files and the chat template in a tokenizer's folder, checked, and turns errors of libraries into one.

The libraries take a wrong type or id in silence, allocate memory for an id of 10**9, or fail with all kinds of errors.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from utils.errors import UserError
from utils.files import read_json
from utils.schema import Schema

_Id = Annotated[int, Field(strict=True, ge=0, lt=10_000_000)]


class _Token(Schema):
    content: str


class _AddedToken(_Token):
    id: _Id


class _NamedTemplate(Schema):
    name: str
    template: str


class _Model(Schema):
    vocab: dict[str, _Id] | list | None = None


class _TokenizerJson(Schema):
    model: _Model | None = None
    added_tokens: list[_AddedToken] | None = None


class _Config(Schema):
    """Keys of tokenizer_config.json and special_tokens_map.json."""

    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    unk_token: str | _Token | None = None
    pad_token: str | _Token | None = None
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^\d{1,7}$")], _Token] | None = None
    auto_map: dict | list | None = None
    chat_template: str | list[_NamedTemplate] | None = None
    model_input_names: list[str] | None = None
    model_max_length: int | float | None = None
    tokenizer_class: str | None = None


FILES = {
    "tokenizer.json": _TokenizerJson,
    "tokenizer_config.json": _Config,
    "special_tokens_map.json": _Config,
    "added_tokens.json": dict[str, _Id],
    "vocab.json": dict[str, _Id],
}


def read_tokenizer_file(folder: Path, name: str, flag: str) -> dict[str, Any]:
    """Returns the object in a JSON file of FILES, {} if there is none. Raises UserError for one that is damaged."""
    file = folder / name
    if not is_there(file, flag):
        return {}
    return read_json(file, flag, FILES[name])


def check_tokenizer_files(folder: Path, flag: str) -> dict[str, dict[str, Any]]:
    """Returns the objects in the JSON files of a tokenizer's folder, by name. Raises UserError if one is damaged."""
    return {name: read_tokenizer_file(folder, name, flag) for name in FILES}


def is_there(file: Path, flag: str) -> bool:
    """Whether a file exists. Raises UserError for something else of this name: a folder, a pipe, a broken link."""
    if os.path.lexists(file) and not file.is_file():
        raise UserError(f"{flag}: {file} is not a file; copy it again")
    return file.is_file()


def read_chat_template(folder: Path, flag: str) -> str | None:
    """Returns the chat template in a tokenizer's folder, the default one of several. Raises UserError without it."""
    file = folder / "chat_template.jinja"
    if is_there(file, flag):
        with library_errors(f"{flag}: {file} is not readable"):
            return file.read_text("utf-8")
    template = read_tokenizer_file(folder, "tokenizer_config.json", flag).get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise UserError(f"{flag}: {folder} has several chat templates, none of them named default; rename one")
        return named["default"]
    return template


@contextlib.contextmanager
def library_errors(what: str, advice: str = "copy the folder again") -> Iterator[None]:
    """Context in which errors, also panics of Rust, become UserErrors: `what`, the reason, `advice`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" .")
        raise UserError(f"{what}: {reason}; {advice}") from error
