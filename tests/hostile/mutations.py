"""Random changes of valid files that respect their structure. Each takes a random.Random and gives new content."""

import io
import json
import pickletools
import random
import re
import struct
import zipfile

LEAVES = [
    None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e308, 10**9, 10**12, 2**31, 2**63, 2**64, -(2**63), 10**400, float("nan"), float("inf"),
    -float("inf"), "", " ", "x", "1", "-1", "a" * 300, "\x1b[2J", "\0", "\ud800", "\u202e", "../x", "/etc/passwd", "{{ 7 * 7 }}", "cpu", "float32",
    "llama", "BPE", "<s>", "</s>", [], {}, [0], [[]], {"a": 1}, {"": None}, ["x"], [None] * 9,
]  # fmt: skip
KEYS = ["", "x", "type", "id", "content", "auto_map", "vocab", "step", "model_type", "text_config", "dtype", "\x1b[2J", "__class__", "a" * 300]
JINJA = [
    "{{ ", " }}", "{% ", " %}", "{% if ", "{% endif %}", "{% for m in messages %}", "{% endfor %}", "{% set x = ", "{% macro a() %}", "{% endmacro %}", "messages",
    "m['content']", "m['role']", "m.role == 'user'", "add_generation_prompt", "eos_token", "bos_token", "namespace(x=1)", "range(99)", "range(10**8)", "loop.index0",
    " | trim", " | tojson", " | length", " | join(',')", " | sort", " | map(attribute='content')", " | first", " | replace('a', 'b')", " + ", " * ", " ** ", " // 0",
    " % ", " and ", " not ", " in ", "[0]", "[-1]", "['x']", "(", ")", "[", "]", "'a'", "\"", "10**9", "a()", ".split('a')", ".__class__", ".items()", "raise_exception('x')",
    "<|im_start|>", "<|im_end|>\n", "\n", "-", "{# ", " #}", "{% raw %}", "{% break %}", "{% continue %}", "{% generation %}", "none", "true", "strftime_now('%Y')", "\x1b[2J",
]  # fmt: skip


def mutate_value(rng: random.Random, content):
    """A JSON value with one to three changes, each at a place that is chosen level by level."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
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
    """Another value in place of one: anything, or one that is near."""
    how = rng.random()
    if how < 0.45:
        return rng.choice(LEAVES)
    if how < 0.52:
        return [value]
    if how < 0.57:
        return {rng.choice(KEYS): value}
    if how < 0.6:
        for _ in range(rng.choice([3, 60, 150])):
            value = [value]
        return value
    if isinstance(value, bool) or value is None:
        return rng.choice([not value, str(value), int(bool(value))])
    if isinstance(value, int | float):
        return rng.choice([-value, value + 1, value - 1, value * 10, value * 2, value + 0.5, str(value), -value - 1, value * 1e9])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value.upper(), value * 2, value[::-1], value + "\n", value.replace("e", "\u0301", 1), [*value[:9]]])
    return rng.choice([[], {}, str(value)[:99]])


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file with another value in it, rarely with other bytes."""
    if rng.random() < 0.07:
        return mutate_bytes(rng, content)
    return json.dumps(mutate_value(rng, json.loads(content))).encode("utf-8", "surrogatepass")


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes that are cut, changed, doubled or mixed up in a few places."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(content) + 1)
        size = rng.choice([0, 1, 1, 2, 4, 8, 60])
        new = rng.choice([b"", bytes([rng.randrange(256)]), rng.randbytes(size), b"\0" * size, b"\xff" * size, content[place : place + size] * 2])
        how = rng.random()
        if how < 0.15:
            content = content[:place]
        else:
            content = content[:place] + new + content[place + (0 if how < 0.4 else len(new) if how < 0.8 else size) :]
    return content


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Another header over the same data, or other data."""
    how = rng.random()
    (size,) = struct.unpack("<Q", content[:8])
    if how < 0.6:
        header = json.loads(content[8 : 8 + size])
        keys = [key for key in header if key != "__metadata__"]
        name = rng.choice(keys)
        if rng.random() < 0.5:
            header[name] = mutate_value(rng, header[name])
        elif rng.random() < 0.5:
            header[name] |= {rng.choice(["data_offsets", "shape"]): header[rng.choice(keys)][rng.choice(["data_offsets", "shape"])]}
        else:
            header = mutate_value(rng, header)
        new = json.dumps(header).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(new) if rng.random() < 0.95 else rng.choice([0, 1, 2**63, len(new) + 1])) + new + content[8 + size :]
    if how < 0.8:
        return mutate_bytes(rng, content)
    place = rng.randrange(8 + size, len(content)) // 4 * 4
    return content[:place] + rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", rng.randbytes(4)]) + content[place + 4 :]


OPCODES = [code.code.encode("latin-1") for code in pickletools.opcodes]
SPLICES = [
    b"cos\nsystem\nX\x09\0\0\0touch ran\x85R", b"cbuiltins\nexec\n", b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n)R", b"X\xff\xff\xff\x7f", b"T\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"r\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"(", b"2" * 50, b"\x85" * 50, b"]", b"}", b"0", b"Q", b"R", b"b", b"\x81", b"\x93", b"h\0", b"\x82\x01", b"N", b"G" + b"\xff" * 8,
]  # fmt: skip


def mutate_pickle(rng: random.Random, content: bytes) -> bytes:
    """A pickle with opcodes left out, doubled, exchanged or put in."""
    try:
        places = [place for _, _, place in pickletools.genops(content)]
    except Exception:  # noqa: BLE001 - a pickle among other bytes
        places = list(range(0, len(content), 7))
    parts = [content[a:b] for a, b in zip(places, [*places[1:], len(content)])]
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(parts))
        how = rng.random()
        if how < 0.2:
            parts[at] = b""
        elif how < 0.35:
            parts[at] += parts[rng.randrange(len(parts))]
        elif how < 0.5:
            parts[at] = rng.choice(OPCODES) + parts[at][1:]
        elif how < 0.8:
            parts[at] = rng.choice(SPLICES) + parts[at]
        else:
            parts[at] = mutate_bytes(rng, parts[at])
    return b"".join(parts)


def mutate_bin(rng: random.Random, content: bytes) -> bytes:
    """A file of torch.save with another pickle, other records, or other bytes."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return mutate_pickle(rng, content) if rng.random() < 0.7 else mutate_bytes(rng, content)
    how = rng.random()
    if how < 0.15:
        return mutate_bytes(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl")) if how < 0.75 else rng.choice(list(members))
    if how < 0.75:
        members[name] = mutate_pickle(rng, members[name])
    elif rng.random() < 0.3:
        members[rng.choice([name + "x", "../../ran", "/ran", name.replace("0", "1"), "constants.pkl"])] = members.pop(name)
    else:
        members[name] = mutate_bytes(rng, members[name]) if rng.random() < 0.8 else b""
    packed = rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(found := io.BytesIO(), "w", packed) as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return found.getvalue()


def mutate_sentencepiece(rng: random.Random, content: bytes) -> bytes:
    """A tokenizer.model with other pieces or settings, or other bytes."""
    from transformers.convert_slow_tokenizer import import_protobuf

    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    proto = import_protobuf().ModelProto.FromString(content)
    for _ in range(rng.choice([1, 2, 4])):
        part = rng.choice([proto.pieces[rng.randrange(len(proto.pieces))], proto.trainer_spec, proto.normalizer_spec])
        fields = [field for field in part.DESCRIPTOR.fields if not _is_repeated(field)]
        field = rng.choice(fields)
        kinds = {field.CPPTYPE_STRING: [b"", b"a", "▁".encode(), b"</s>", b"\xff", b"a" * 500] if field.type == field.TYPE_BYTES else ["", "a", "▁", "</s>", "\0", "a" * 500]}
        numbers = [0, 1, 2, 3, 4, 5, 6, -1, 10**6, 2**31 - 1, -(2**31), float("nan"), float("inf")]
        try:
            setattr(part, field.name, rng.choice(kinds.get(field.cpp_type, numbers)))
        except (TypeError, ValueError):  # a number that the field does not take
            part.ClearField(field.name)
        if rng.random() < 0.15:
            at = rng.randrange(len(proto.pieces))
            rng.choice([lambda: proto.pieces.__delitem__(at), lambda: proto.pieces.add().CopyFrom(proto.pieces[at]), lambda: proto.pieces.__delitem__(slice(at, None))])()
        if not proto.pieces:
            break
    return proto.SerializePartialToString()


def _is_repeated(field) -> bool:
    return field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED


def mutate_template(rng: random.Random, content: bytes) -> bytes:
    """A chat template with parts left out, doubled, exchanged or put in."""
    parts = re.findall(r"\{[{%#]-?|-?[}%#]\}|\w+|\s+|'[^']*'|[^\w\s]", content.decode())
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        at = rng.randrange(len(parts))
        how = rng.random()
        if how < 0.2:
            del parts[at : at + rng.choice([1, 1, 3, 9])]
        elif how < 0.35:
            parts[at:at] = parts[at : at + 9]
        elif how < 0.45:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif how < 0.9:
            parts.insert(at, rng.choice(JINJA))
        else:
            parts[at] = rng.choice(JINJA)
        if not parts:
            break
    return "".join(parts).encode("utf-8", "surrogatepass")


def mutate_lines(rng: random.Random, content: bytes) -> bytes:
    """A file of JSON lines with another value, or other bytes, in one of them."""
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    lines[at] = mutate_json(rng, lines[at]) + rng.choice([b"\n"] * 9 + [b"", b"\r\n"])
    return b"".join(lines)


