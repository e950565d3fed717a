"""Changes of files in a case's folder: values in JSON, raw headers of safetensors, pickles, hashes made right again."""

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

REMOVED = object()  # in place of a value: the key is not there
Change = Callable[[Path], object]


def holding(name: str, content: str | bytes) -> Change:
    """All that the file holds. Half of a surrogate pair in a text is a byte."""

    def change(folder: Path) -> None:
        file = folder / name
        file.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))

    return change


def put(name: str, place: str, value) -> Change:
    """A value in a JSON file. place: keys and indices with dots between them; "" is the whole of it."""

    def change(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        content = value if not place else put_value(content, place.split("."), value)
        file.write_text(json.dumps(content), encoding="utf-8")

    return change


def put_value(content, keys: list[str], value):
    """The content with a value at the end of the keys; objects on the way there are made."""
    *way, last = keys
    inner = content
    for key in way:
        inner = inner[int(key)] if isinstance(inner, list) else inner.setdefault(key, {})
    last = int(last) if isinstance(inner, list) else last
    if value is REMOVED:
        del inner[last]
    else:
        inner[last] = value
    return content


def all_of(*changes: Change) -> Change:
    """One after the other."""
    return lambda folder: [change(folder) for change in changes]


def without(*names: str) -> Change:
    """Files that are not there."""
    return lambda folder: [(folder / name).unlink() for name in names]


def in_place(name: str, make: Callable[[Path], object]) -> Change:
    """Something other than a file where the file was, such as a folder or a FIFO."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def tensors(name: str, edit: Callable[[dict], dict | None]) -> Change:
    """Other tensors in a safetensors file. edit: changes the dict, or gives another one."""

    def change(folder: Path) -> None:
        state = load_file(folder / name)
        state = edit(state) or state
        save_file({key: x.contiguous() for key, x in state.items()}, folder / name, metadata={"format": "pt"})

    return change


def header(name: str, edit: Callable[[dict], object]) -> Change:
    """Another header of a safetensors file, over the same data. edit: changes the dict, or gives what stands there."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        found = json.loads(content[8 : 8 + size])
        given = edit(found)
        new = given if isinstance(given, bytes) else json.dumps(found if given is None else given).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])

    return change


def as_bin(pickled: bytes | None = None, records: dict[str, bytes] | None = None, **options) -> Change:
    """A pytorch_model.bin in place of model.safetensors. pickled: instead of data.pkl; records: other members.

    options: of zipfile.ZipFile.
    """

    def change(folder: Path) -> None:
        file = folder / "pytorch_model.bin"
        torch.save(load_file(folder / "model.safetensors"), file)
        (folder / "model.safetensors").unlink()
        with zipfile.ZipFile(file) as archive:
            top = archive.namelist()[0].partition("/")[0]
            members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        members |= records or {}
        if pickled is not None:
            members["data.pkl"] = pickled
        with zipfile.ZipFile(file, "w", **options) as archive:
            for name, content in members.items():
                if content is not None:
                    archive.writestr(f"{top}/{name}", content)

    return change


class Call:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function: Callable, *arguments):
        self.given = function, arguments

    def __reduce__(self):
        return self.given


def pickle_of(function: Callable, *arguments) -> bytes:
    """The pickle of a call, in the protocol that torch writes."""
    return pickle.dumps({"w": Call(function, *arguments)}, protocol=2)


def legacy_bin(content: bytes) -> Change:
    """A pytorch_model.bin of these bytes in place of model.safetensors."""
    return all_of(without("model.safetensors"), holding("pytorch_model.bin", content))


def rehash(folder: Path) -> None:
    """Makes the manifest of a checkpoint's folder agree with the files that are there and that it names."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in manifest:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    file.write_text(json.dumps(manifest))


def named_too(name: str) -> Change:
    """The manifest of a checkpoint names one more file; `rehash` adds its size and hash."""

    def change(folder: Path) -> None:
        file = folder / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: {"bytes": 0, "sha256": ""}}))

    return change


def nested(depth: int) -> str:
    """JSON of that many lists in each other."""
    return "[" * depth + "]" * depth


def fifo(path: Path) -> None:
    """A pipe with a name, which nobody writes to."""
    os.mkfifo(path)
