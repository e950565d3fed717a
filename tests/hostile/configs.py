"""Cases of config.json, generation_config.json and weights."""

import os
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tests.hostile.case import Case, named, some, values_of
from tests.hostile.changes import (
    all_of,
    as_bin,
    fifo,
    header,
    holding,
    in_place,
    legacy_bin,
    nested,
    pickle_of,
    tensors,
    without,
)

HUGE, NAN, INF = 10**12, float("nan"), float("inf")
policy = partial(Case, "sft", "policy", flags={"hf_model_name_or_path": "{model}"})
judge = partial(Case, "score", "judge", flags={"model": "{model}"})
base = partial(Case, "merge", "raw", flags={"path_raw": "{model}"})
diff = partial(Case, "merge", "diff", flags={"path_diff": "{model}"})

VALUES = {
    "hidden_size": [-32, 0, 10**9, "32"], "num_hidden_layers": [-1, 0, 10**9, 2.5, 3], "num_attention_heads": [0, HUGE,
    5],
    "num_key_value_heads": [0, HUGE], "head_dim": [-16, 0, HUGE], "intermediate_size": [0, HUGE],
    "vocab_size": [-400, HUGE, 1], "max_position_embeddings": [-512, 0, 10**18, "512"], "rms_norm_eps": [NAN, INF,
    "1e-6"],
    "hidden_act": ["no_such", 3, "__import__('os').system('touch ran')"], "rope_scaling": ["x", {"type": "linear",
    "factor": NAN}],
    "rope_parameters": ["x", {"rope_type": "no_such"}, {"rope_theta": "x"}, {"rope_theta": 0, "rope_type": "default"}],
    "dtype": ["float99", 3, []], "torch_dtype": ["garbage", {}], "eos_token_id": [HUGE, "2", [2, "x"]],
    "bos_token_id": [HUGE],
    "pad_token_id": [-1, 400, "x"], "architectures": [3, [3], []], "model_type": [3, [], "../llama", "bert"],
    "auto_map": [3, "x", {"AutoModelForCausalLM": "../../x.Y"}], "attention_dropout": [NAN, 2, -1],
    "initializer_range": ["x"],
    "quantization_config": [3, {"quant_method": 3}, {"quant_method": "gptq", "bits": -1}],
    "tie_word_embeddings": [True],
    "layer_types": ["x", ["no_such", "no_such"]], "_attn_implementation": [3, "someone/kernel", []],
    "is_encoder_decoder": [True],
    "text_config": [3, {"hidden_size": -1}], "id2label": [3], "num_labels": [HUGE], "": [3, None, []],
}  # fmt: skip
MAY = {
    "max_position_embeddings = 1000000000000000000": "a window is a limit, and takes no memory",
    "pad_token_id = -1": "published LLaMA configs have it", "architectures = []": "it names no class",
    **{f"attention_dropout = {x}": "all dropout is switched off" for x in ("NaN", "2", "-1")},
    "torch_dtype = {}": "a dtype per part is a form of transformers",
    'auto_map = {"AutoModelForCausalLM": "../../x.Y"}': "code of a folder is never run, and transformers has the class",
}  # fmt: skip
GENERATION = {"eos_token_id": [HUGE, "x", [2, None], [[2]], {}, True], "temperature": [NAN], "": [3, [], None]}
SAMPLING = {"temperature = NaN": "sampling has flags of its own"}
TEXTS = {
    "deep": nested(100_000), "deep object": '{"a":' * 50_000 + "1" + "}" * 50_000, "digits": '{"a": ' + "9" * 100_000
    + "}",
    "empty": "", "not UTF-8": '{"model_type": "\udcff"}', "a BOM": "\ufeff{}", "cut": '{"model_type": "llama"',
    "two objects": "{}{}", "a lone surrogate": '{"model_type": "\\ud800"}',
    "an escape": '{"model_type": "\\u001b[2J\\u009b31m"}',
}  # fmt: skip
PLACES = {
    "a folder": lambda path: path.mkdir(), "a FIFO": fifo, "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
}  # fmt: skip


def again(case: Case, accepted: str = "") -> Case:
    """A case that is there already, for another name. accepted: why it may go on, if it does not say so itself."""
    return replace(case, accepted=case.accepted or accepted)


def files(name: str, make, **accepted: str) -> dict[str, Case]:
    """What may stand in the place of a JSON file. accepted: title, with _ for spaces -> why that may go on."""
    changes = {title: holding(name, text) for title, text in TEXTS.items()}
    changes |= {title: in_place(name, build) for title, build in PLACES.items()}
    reasons = {title.replace("_", " "): reason for title, reason in accepted.items()}
    return named(f"{name}: {{}}", changes, make, {"a BOM": "a mark of UTF-8"} | reasons)


FOREIGN = "keys that are not known are ignored"
OF_REWARD = {"score_center": [NAN, [1], 10**400], "id2label": [{"a": 1}]}
OF_DIFF = {
    "num_hidden_layers": [HUGE], "num_attention_heads": [0], "hidden_size": [0], "rope_theta": ["x", 0],
    "head_dim": [HUGE],
    "rope_parameters": [3],
}  # fmt: skip
CONFIGS = (
    values_of("config.json", VALUES, policy, MAY)
    | values_of("generation_config.json", GENERATION, policy, SAMPLING)
    | files("config.json", policy)
    | files("generation_config.json", policy, an_escape=FOREIGN, a_lone_surrogate=FOREIGN)
    | named("{} (a reward model)", values_of("config.json", OF_REWARD, judge), again)
    | named("{} (a diff)", values_of("config.json", OF_DIFF, diff), again)
)

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
CASES = CONFIGS | WEIGHTS | INDICES
