"""Cases of weights: safetensors, pickles, archives, indices."""

import os
import struct
from pathlib import Path

import torch

from tests.hostile.case import Case, named, some, values_of
from tests.hostile.changes import (
    all_of,
    as_bin,
    header,
    in_place,
    legacy_bin,
    nested,
    pickle_of,
    tensors,
    without,
)
from tests.hostile.configs import INF, PLACES, again, base, files, policy

ST = "model.safetensors"
EMBED, NORM, UP = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


def stretched(name: str, start: int, end: int):
    """Other places of a tensor in a header."""

    def edit(found: dict) -> None:
        first, last = found[name]["data_offsets"]
        found[name]["data_offsets"] = [first + start, last + end]

    return edit


def key(name: str, place: str, value):
    """Another value in the header's entry of a tensor."""

    def edit(found: dict) -> None:
        found[name][place] = value

    return edit


def onto(name: str, other: str):
    """A tensor lies where another one of its size does."""

    def edit(found: dict) -> None:
        found[name]["data_offsets"] = found[other]["data_offsets"]

    return edit


HEADERS = {
    "overlapping": onto(UP, "model.layers.1.mlp.up_proj.weight"), "a shift back": stretched(NORM, -8, -8),
    "negative offsets": key(NORM, "data_offsets", [-64, 64]), "beyond the end": stretched(NORM, 10**9, 10**9),
    "offsets that fall": key(NORM, "data_offsets", [128, 0]), "offsets of text": key(NORM, "data_offsets", "0-128"),
    "three offsets": key(NORM, "data_offsets", [0, 1, 2]), "no offsets": key(NORM, "data_offsets", None),
    "a shape beyond its bytes": key(NORM, "shape", [10**6]), "a negative shape": key(NORM, "shape", [-32]),
    "a shape of text": key(NORM, "shape", ["32"]), "a huge shape": key(NORM, "shape", [2**40, 2**40]),
    "a shape with nothing": key(NORM, "shape", [0]), "no such dtype": key(NORM, "dtype", "F99"),
    "a dtype of another size": key(NORM, "dtype", "F64"), "dtype of a number": key(NORM, "dtype", 32),
    "an entry that is a list": lambda found: found.update({NORM: []}), "no entries": lambda found: {},
    "a header that is a list": lambda found: [1],
    "metadata that are a list": lambda found: found.update(__metadata__=[1]),
    "metadata of numbers": lambda found: found.update(__metadata__={"format": 3}),
    "deep": lambda found: nested(50_000).encode(),
    "NaN": lambda found: b'{"a": NaN}', "not UTF-8": lambda found: b'{"\xff": 1}',
    "twice": lambda found: b'{"a":1,"a":2}',
    "an escape in a name": lambda found: found.update({"\x1b[2J": found.pop(NORM)}),
    "a hole": lambda found: found.pop(UP) and None,
}  # fmt: skip
LENGTHS = {"0": 0, "1": 1, "beyond the file": 10**9, "2**63": 2**63, "2**64 - 1": 2**64 - 1, "100 MB": 10**8}


def length(size: int):
    """Another length of the header."""

    def change(folder) -> None:
        file = folder / ST
        file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])

    return change


def sparse(path: Path, size: int) -> None:
    """A file of so many bytes, none of which is on the disk."""
    path.touch()
    os.truncate(path, size)


def as_type(dtype: torch.dtype):
    """All tensors in another type."""
    return tensors(ST, lambda state: {name: x.to(dtype) for name, x in state.items()})


def torch_call(name: str, *arguments) -> bytes:
    """The pickle of a call of one of torch's functions that unpickling allows."""
    return pickle_of(getattr(torch._utils, name), *arguments)


# Opcodes of pickle by hand: a protocol, then what asks for memory or time.
BOMB = b"\x80\x02" + b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
GET = b"\x80\x02h\x05."
LONG_TEXT = b"\x80\x02X\xff\xff\xff\x7fabc."
LONG_BYTES = b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc."
MANY = b"\x80\x02]" + b"2" * 2_000_000 + b"."  # copies of a list on the stack
MEMO = b"\x80\x02]r\xff\xff\xff\x7f."
NESTED = b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b"."
DEEP = b"\x80\x02]" + b"\x85" * 1_000_000 + b"."
PICKLES = {
    "a bytearray of 2 GB": BOMB, "a memo that is not there": GET, "a text of 2 GB": LONG_TEXT,
    "bytes of 1 TB": LONG_BYTES,
    "two million copies": MANY, "a far place in the memo": MEMO, "a million marks": NESTED, "a million tuples": DEEP,
    "empty": b"", "a stop alone": b".", "an unknown opcode": b"\x80\x02\xff.", "protocol 99": b"\x80c}.",
    "a number": b"\x80\x02K\x05.", "a call of a number": b"\x80\x02K\x05)R.",
    "a global of os": b"\x80\x02cos\nsystem\nX\x09\x00\x00\x00touch ran\x85R.",
    "a global of builtins": b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
    "a global of torch": b"\x80\x02ctorch.hub\nload\n)R.",
    "a global of numpy": b"\x80\x02cnumpy\nones\nJ\xff\xff\xff\x7f\x85R.",
    "a name with dots": b"\x80\x04\x8c\x05torch\x8c\x0d_utils.system\x93.",
    "an escape in a name": b"\x80\x02c\x1b[2J\nx\n.",
    "a storage of text": b"\x80\x02X\x01\x00\x00\x00xQ.", "extensions": b"\x80\x02\x82\x01.",
    "an instance of a class": b"\x80\x02(ios\nsystem\n.", "build on a list": b"\x80\x02]}b.",
    "an OrderedDict of numbers": b"\x80\x02ccollections\nOrderedDict\n)R.",
    "a parameter of nothing": torch_call("_rebuild_parameter", None, True, None),
    "a tensor of nothing": torch_call("_rebuild_tensor_v2", None, 0, (2**40,), (1,), False, None),
    "a device tensor": torch_call("_rebuild_device_tensor_from_numpy", None, None, "cpu", False),
}  # fmt: skip
RECORDS = {
    "big-endian": {"byteorder": b"big"}, "no such order": {"byteorder": b"middle"},
    "a storage that is too short": {"data/0": b"1234"},
    "a storage that is too long": {"data/0": b"0" * 10**6}, "an empty storage": {"data/0": b""},
    "a storage left out": {"data/0": None}, "no pickle": {"data.pkl": None}, "version of text": {"version": b"three\n"},
    "TorchScript": {"constants.pkl": b"\x80\x02)."}, "a foreign name": {"../../ran": b"1"},
    "alignment of text": {".format_version": b"x"},
}  # fmt: skip

BIN_ALONE = (without(ST), lambda folder: sparse(folder / "pytorch_model.bin", 3 << 30))
CHANGES = {
    "a sparse file of 3 GB": in_place(ST, lambda path: sparse(path, 3 << 30)),
    "a .bin of 3 GB of nothing": all_of(*BIN_ALONE),
    "a .bin that is a safetensors file": lambda folder: (folder / ST).rename(folder / "pytorch_model.bin"),
    "an embedding of other width": tensors(ST, lambda s: {**s, EMBED: torch.ones(400, 31)}),
    "an embedding of fewer rows": tensors(ST, lambda s: {**s, EMBED: torch.ones(399, 32)}),
    "an infinite value": tensors(ST, lambda s: {**s, NORM: s[NORM] * INF}),
    "a tensor of no size": tensors(ST, lambda s: {**s, NORM: torch.ones(())}),
    "a tensor more": tensors(ST, lambda s: {**s, "x" * 5000: torch.ones(3)}),
}  # fmt: skip
CHANGES |= {title: in_place(ST, build) for title, build in PLACES.items()}
MORE = {"a tensor more": "transformers ignores tensors that the model does not have"}
UNREAD = dict.fromkeys(("a foreign name", "alignment of text"), "a member that torch does not ask for is not read")
FLOATS = {name: as_type(getattr(torch, name)) for name in ("float8_e4m3fn", "float64", "float16")}
OTHERS = {name: as_type(getattr(torch, name)) for name in ("int8", "bool", "complex64")}
LEGACY = {title: legacy_bin(content) for title, content in list(PICKLES.items())[:9] if len(content) < 99}
SAFETENSORS = {title: header(ST, edit) for title, edit in HEADERS.items()}
BINS = {f"pickle: {title}": as_bin(content) for title, content in PICKLES.items()}
ARCHIVES = {title: as_bin(records=records) for title, records in RECORDS.items()}
OF_BASE = (
    some(SAFETENSORS, "negative offsets", "offsets that fall", "a shape beyond its bytes", "a huge shape", "deep")
    | some(ARCHIVES, "big-endian", "a storage that is too short", "a storage left out")
    | some(
        BINS,
        *(f"pickle: {x}" for x in ("a bytearray of 2 GB", "bytes of 1 TB", "a global of os", "a parameter of nothing")),
    )
)
WEIGHTS = (
    named("weights: {}", SAFETENSORS | BINS, policy)
    | named("weights: archive: {}", ARCHIVES, policy, UNREAD)
    | named("weights: legacy pickle: {}", LEGACY, policy)
    | named("weights: a header of length {}", {title: length(size) for title, size in LENGTHS.items()}, policy)
    | named("weights: all in {}", FLOATS, policy, "floats are rounded to --dtype")
    | named("weights: all in {}", OTHERS, policy)
    | named("weights: {}", CHANGES, policy, MORE)
    | named("weights of a base: {}", OF_BASE | some(CHANGES, "a FIFO"), base)
)


SHARD, LIST = "model-00001-of-00001.safetensors", f"{ST}.index.json"
INDEX = {
    "": [3, [], {}], "weight_map": [3, {}, None, {EMBED: "/etc/passwd"}, {EMBED: "../policy/model.safetensors"},
    {EMBED: "."}, {EMBED: ".."}, {EMBED: "\x1b[2J"},
                                     {EMBED: "a\0b"}, {EMBED: ["a"]}, {"": SHARD}, {EMBED: "config.json"},
                                     {EMBED: "x" * 5000}, {EMBED: SHARD}],
}  # fmt: skip


def sharded(make):
    """Cases whose weights are in a shard that an index names."""

    def case(change, **options) -> Case:
        return make(all_of(lambda folder: (folder / ST).rename(folder / SHARD), change), **options)

    return case


INDICES = values_of(LIST, INDEX, sharded(policy)) | files(LIST, sharded(policy))
INDICES |= named("{} (a base)", dict(list(values_of(LIST, INDEX, sharded(base)).items())[3:]), again)
CASES = WEIGHTS | INDICES
