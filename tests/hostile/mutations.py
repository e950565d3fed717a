"""Random changes of valid files that respect their structure. Each takes a random.Random and gives new content."""

import contextlib
import io
import json
import pickletools
import random
import re
import struct
import zipfile

LEAVES = [
    None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e308, 10**9, 10**12, 2**31, 2**63, 2**64, -(2**63), 10**400,
    float("nan"), float("inf"),
    -float("inf"), "", " ", "x", "1", "-1", "a" * 300, "\x1b[2J", "\0", "\ud800", "\u202e", "../x", "/etc/passwd",
    "{{ 7 * 7 }}", "cpu", "float32",
    "llama", "BPE", "<s>", "</s>", [], {}, [0], [[]], {"a": 1}, {"": None}, ["x"], [None] * 9,
]  # fmt: skip
KEYS = [
    "",
    "\x1b[2J",
    "a" * 300,
    *["x", "type", "id", "content", "auto_map", "vocab", "step", "model_type", "text_config", "dtype", "__class__"],
]
JINJA = [
    "{{ ", " }}", "{% ", " %}", "{% if ", "{% endif %}", "{% for m in messages %}", "{% endfor %}", "{% set x = ",
    "{% macro a() %}", "{% endmacro %}", "messages",
    "m['content']", "m['role']", "m.role == 'user'", "add_generation_prompt", "eos_token", "bos_token",
    "namespace(x=1)", "range(99)", "range(10**8)", "loop.index0",
    " | trim", " | tojson", " | length", " | join(',')", " | sort", " | map(attribute='content')", " | first",
    " | replace('a', 'b')", " + ", " * ", " ** ", " // 0",
    " % ", " and ", " not ", " in ", "[0]", "[-1]", "['x']", "(", ")", "[", "]", "'a'", "\"", "10**9", "a()",
    ".split('a')", ".__class__", ".items()", "raise_exception('x')",
    "<|im_start|>", "<|im_end|>\n", "\n", "-", "{# ", " #}", "{% raw %}", "{% break %}", "{% continue %}",
    "{% generation %}", "none", "true", "strftime_now('%Y')", "\x1b[2J",
]  # fmt: skip


def mutate_value(rng: random.Random, content):
    """A JSON value with up to three changes, each at a place that is chosen level by level."""
    for _ in range(rng.choice([0, *[1] * 12, 2, 2, 3])):
        content = _changed(rng, content)
    return content


def _changed(rng: random.Random, content):
    if isinstance(content, dict | list) and content and rng.random() < 0.8:
        content = content.copy()
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = rng.choice(keys)
        how = rng.random()
        if how < 0.08:
            del content[key]
        elif how < 0.14 and isinstance(content, dict):
            content[rng.choice(KEYS)] = content.pop(key)
        elif how < 0.2:
            other = rng.choice(keys)
            content[key], content[other] = content[other], content[key]
        elif how < 0.25 and isinstance(content, dict):
            content[rng.choice(KEYS)] = rng.choice(LEAVES)
        elif how < 0.25:
            content.insert(key, rng.choice([content[key], rng.choice(LEAVES)]))
        else:
            content[key] = _changed(rng, content[key])
        return content
    return _other(rng, content)


def _other(rng: random.Random, value):
    """Another value in place of one: anything, one that is near, or the same one inside of something."""
    how = rng.random()
    if how < 0.5:
        return rng.choice(LEAVES)
    if how < 0.6:
        for _ in range(rng.choice([1, 1, 3, 60, 150])):
            value = rng.choice([[value], {rng.choice(KEYS): value}])
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return rng.choice([-value, value + 1, value - 1, value * 10, 0.5, str(value), value * 10**9])
    text = value if isinstance(value, str) else str(value)[:99]
    return rng.choice(
        [text + "x", text[:-1], text.upper(), text * 2, text + "\n", text.replace("e", "\u0301", 1), [*text[:9]]]
    )


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file with another value in it, rarely with other bytes."""
    if rng.random() < 0.07:
        return mutate_bytes(rng, content)
    return json.dumps(mutate_value(rng, json.loads(content))).encode("utf-8", "surrogatepass")


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes that are cut, changed, doubled or mixed up in a few places."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        place, size, how = rng.randrange(len(content) + 1), rng.choice([0, 1, 2, 4, 60]), rng.random()
        new = rng.choice([rng.randbytes(size), b"\0" * size, b"\xff" * size, content[place : place + size] * 2])
        behind = len(content) if how < 0.15 else place + (0 if how < 0.4 else len(new) if how < 0.8 else size)
        content = content[:place] + new + content[behind:]
    return content


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Another header over the same data, or other data."""
    how, size = rng.random(), struct.unpack("<Q", content[:8])[0]
    if how < 0.2:
        return mutate_bytes(rng, content)
    if how < 0.4:
        place = rng.randrange(8 + size, len(content) - 4) // 4 * 4
        new = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\xff", rng.randbytes(4)])
        return content[:place] + new + content[place + 4 :]
    header = json.loads(content[8 : 8 + size])
    keys = [key for key in header if key != "__metadata__"]
    name, other = rng.choice(keys), rng.choice(keys)
    if how < 0.65:
        header[name] = mutate_value(rng, header[name])
    elif how < 0.8:
        header[name] = header[name] | {
            rng.choice(["data_offsets", "shape"]): header[other][rng.choice(["data_offsets", "shape"])]
        }
    else:
        header = mutate_value(rng, header)
    new = json.dumps(header).encode("utf-8", "surrogatepass")
    length = rng.choice([*[len(new)] * 19, rng.choice([0, 1, 2**63, len(new) + 1])])
    return struct.pack("<Q", length) + new + content[8 + size :]


SPLICES = [
    b"cos\nsystem\nX\x09\0\0\0touch ran\x85R", b"cbuiltins\nexec\n", b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n)R", b"X\xff\xff\xff\x7f", b"T\xff\xff\xff\x7f", b"\x8e"
    + b"\xff" * 8, b"r\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"(", b"2" * 50, b"\x85" * 50, b"]", b"}", b"0", b"Q", b"R", b"b", b"\x81",
    b"\x93", b"h\0", b"\x82\x01", b"N", b"G" + b"\xff" * 8,
]  # fmt: skip


def mutate_parts(rng: random.Random, parts: list, extra: list) -> list:
    """A sequence with parts left out, doubled, exchanged, or put in from `extra`."""
    for _ in range(rng.choice([0, *[1] * 12, 2, 2, 3, 6])):
        at, other, how = rng.randrange(len(parts) + 1), rng.randrange(len(parts) + 1), rng.random()
        if how < 0.2:
            parts = parts[:at] + parts[at + rng.choice([1, 1, 3, 9]) :]
        elif how < 0.35:
            parts = parts[:at] + parts[other : other + 9] + parts[at:]
        else:
            parts = [*parts[:at], rng.choice(extra), *parts[at + (how > 0.85) :]]
    return parts


def mutate_pickle(rng: random.Random, content: bytes) -> bytes:
    """A pickle with other opcodes; of several in a row, the first one."""
    places = [place for _, _, place in pickletools.genops(content)]
    end = places[-1] + 1
    parts = [content[a:b] for a, b in zip(places, [*places[1:], end])]
    return b"".join(mutate_parts(rng, parts, SPLICES)) + content[end:]


def mutate_bin(rng: random.Random, content: bytes) -> bytes:
    """A file of torch.save with another pickle, other records, or other bytes."""
    how = rng.random()
    if how < 0.15:
        return mutate_bytes(rng, content)
    if not zipfile.is_zipfile(io.BytesIO(content)):  # legacy: three short pickles, the tensors' one, and the data
        start = rng.choice([0, *[match.start() for match in re.finditer(b"\x80\x02[}c]", content)]])
        return content[:start] + mutate_pickle(rng, content[start:])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    if how < 0.7:
        name = next(name for name in members if name.endswith("data.pkl"))
        members[name] = mutate_pickle(rng, members[name])
    elif how < 0.8:
        members[rng.choice([name + "x", "../../ran", "/ran", name.replace("0", "1"), "constants.pkl"])] = members.pop(
            name
        )
    else:
        members[name] = rng.choice([mutate_bytes(rng, members[name]), b""])
    with zipfile.ZipFile(
        found := io.BytesIO(), "w", rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    ) as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return found.getvalue()


def mutate_sentencepiece(rng: random.Random, content: bytes) -> bytes:
    """A tokenizer.model with other pieces or settings, or other bytes."""
    from transformers.convert_slow_tokenizer import import_protobuf

    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    proto = import_protobuf().ModelProto.FromString(content)
    for _ in range(rng.choice([2, 4, 8])):
        part = rng.choice([rng.choice(proto.pieces), proto.trainer_spec, proto.normalizer_spec])
        field = rng.choice(part.DESCRIPTOR.fields).name
        value = rng.choice(
            [
                0,
                1,
                2,
                3,
                4,
                -1,
                10**6,
                2**31 - 1,
                -(2**31),
                float("nan"),
                float("inf"),
                "",
                "a",
                "▁",
                "</s>",
                "\0",
                "a" * 500,
                b"",
                b"\xff",
            ]
        )
        with contextlib.suppress(TypeError, ValueError, AttributeError):  # the field is of another type
            setattr(part, field, value)
    if rng.random() < 0.2:
        pieces = mutate_parts(rng, list(proto.pieces), list(proto.pieces[:9]))
        del proto.pieces[:]
        proto.pieces.extend(pieces)
    return proto.SerializePartialToString()


def mutate_template(rng: random.Random, content: bytes) -> bytes:
    """A chat template with other parts."""
    parts = re.findall(r"\{[{%#]-?|-?[}%#]\}|\w+|\s+|'[^']*'|[^\w\s]", content.decode())
    return "".join(mutate_parts(rng, parts, JINJA)).encode("utf-8", "surrogatepass")


def mutate_lines(rng: random.Random, content: bytes) -> bytes:
    """A file of JSON lines with another value, or other bytes, in one of them."""
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    lines[at] = mutate_json(rng, lines[at]) + rng.choice([b"\n"] * 9 + [b"", b"\r\n"])
    return b"".join(lines)
