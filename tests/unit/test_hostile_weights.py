"""Files of weights made by hand are refused in one line, or give exactly the numbers in them, with 2 GB and 20 s."""

import io
import json
import struct
import zipfile

import pytest
import torch

from utils.errors import UserError
from utils.limits import limited
from utils.models.weight_files import read_tensor, stored_tensors

ONES = struct.pack("<4f", 1, 2, 3, 4)
START = b"\x80\x02"


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(size=(4,), stride=(1,), offset=0, key="0", stored=4, before=b"", metadata=b"") -> bytes:
    """What torch.save writes for a float32 tensor. before: what follows a storage in files before torch 1.6."""
    storage = b"(" + text("storage") + name_of("torch", "FloatStorage") + text(key) + text("cpu") + number(stored)
    hooks = name_of("collections", "OrderedDict") + b")R"
    arguments = storage + before + b"tQ" + number(offset) + numbers(size) + numbers(stride) + b"\x89" + hooks + metadata
    return name_of("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def saved(**tensors: bytes) -> bytes:
    return START + b"}" + b"".join(text(name) + value + b"s" for name, value in tensors.items()) + b"."


def archive(pickled: bytes, *data: bytes, order: str = "little", kind: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as file:
        records = {"data.pkl": pickled, "byteorder": order, "version": "3\n"}
        records |= {f"data/{key}": content for key, content in enumerate(data)}
        for name, content in records.items():
            file.writestr(f"archive/{name}", content)
    return stream.getvalue()


def older(pickled: bytes, keys=("0",), data=(ONES,)) -> bytes:
    """A file as before torch 1.6: four pickles, the list of storages, and their bytes."""
    stream = io.BytesIO()
    torch.save({}, stream, _use_new_zipfile_serialization=False)
    start = stream.getvalue().partition(b"\x80\x02}q\x00.")[0]
    listed = START + b"](" + b"".join(map(text, keys)) + b"e."
    return start + pickled + listed + b"".join(struct.pack("<q", len(part) // 4) + part for part in data)


def called(module: str, name: str, arguments: bytes) -> bytes:
    return saved(x=name_of(module, name) + arguments + b"R")


def bin_files() -> dict[str, tuple[bytes, str]]:
    """Name -> (a pytorch_model.bin, the reason that it is refused for)."""
    resized, sizes = "not resizable", "do not agree on the sizes"
    doubled = b"".join(b"q" + bytes([k]) + b"h" + bytes([k]) + b"\x86" for k in range(200))
    return {
        "a storage that is too short": (archive(saved(x=tensor()), ONES[:8]), sizes),
        "storages of exchanged sizes": (
            archive(saved(x=tensor((2,), stored=2), y=tensor(key="1")), ONES, ONES[:8]), sizes,
        ),
        "no storage": (archive(saved(x=tensor(key="7")), ONES), "data/7"),
        "big-endian": (archive(saved(x=tensor()), ONES, order="big"), "big-endian"),
        "compressed": (archive(b"\0" * 10**5, kind=zipfile.ZIP_DEFLATED), "compressed"),
        "elements beyond the storage": (archive(saved(x=tensor((8,))), ONES), resized),
        "elements before the storage": (archive(saved(x=tensor(offset=-2)), ONES), "invalid storage offset"),
        "a size of 10^11": (archive(saved(x=tensor((10**11,))), ONES), resized),
        "a storage of 10^11": (archive(saved(x=tensor(stored=10**11)), ONES), sizes),
        "10^11 times the same element": (archive(saved(x=tensor((10**11,), (0,))), ONES), "not contiguous"),
        "negative": (archive(saved(x=tensor(metadata=b"}" + text("neg") + b"\x88s")), ONES), "not a plain tensor"),
        "bytearray": (archive(called("builtins", "bytearray", number(10**11) + b"\x85")), "builtins.bytearray"),
        "a storage by its class": (
            archive(called("torch.storage", "UntypedStorage", number(10**11) + b"\x85")), "UntypedStorage",
        ),
        "a storage by its class from the memo": (
            archive(START + name_of("torch.storage", "UntypedStorage") + b"q\x000h\0" + number(10**11) + b"\x85R."),
            "UntypedStorage",
        ),
        "tuples in tuples": (archive(START + b"}" + b")" + b"\x85" * 10**6 + b"Ns."), "too many items"),
        "tuples of pairs of themselves": (archive(START + b"})" + doubled + b"Ns."), "too many items"),
        "marks": (archive(START + b"(" * 10**6 + b"t" * 10**6 + b"."), "too many items"),
        "a long text that is not there": (archive(START + b"}X\xff\xff\xff\xffx."), "expected 4294967295 bytes"),
        "a number for a name": (archive(START + b"}K\x01" + tensor() + b"s.", ONES), "not a plain tensor"),
        "older: bytearray": (called("builtins", "bytearray", number(10**11) + b"\x85"), "builtins.bytearray"),
        "older: a text that is not there": (START + b"X\xff\xff\xff\xffx.", "expected 4294967295 bytes"),
        "older: cut off": (older(saved(x=tensor(before=b"N")))[:-4], "unexpected EOF"),
        "older: a storage of 10^11": (older(saved(x=tensor(stored=10**11, before=b"N"))), "more elements than"),
        "older: a storage that is not listed": (older(saved(x=tensor(before=b"N")), keys=()), sizes),
        "older: a storage that is listed twice": (
            older(saved(x=tensor(before=b"N"), y=tensor(key="1", before=b"N")), ("0", "0"), (ONES, ONES)), sizes,
        ),
        "nothing": (b"", "empty"),
        "the start of an archive": (b"PK\3\4" + b"x" * 1000, "not a zip file"),
    }  # fmt: skip


BIN_FILES = bin_files()


def safetensors(size: int = 64, length: int | None = None, **tensors: tuple) -> bytes:
    entries = {
        n: {"dtype": "F32", "shape": list(shape), "data_offsets": list(at)} for n, (shape, at) in tensors.items()
    }
    header = json.dumps(entries).encode()
    return struct.pack("<Q", length or len(header)) + header + bytes(size)


SAFETENSORS = {
    "overlapping": safetensors(x=((16,), (0, 64)), y=((16,), (0, 64))),
    "negative offsets": safetensors(x=((16,), (-64, 0))),
    "offsets beyond the file": safetensors(x=((32,), (0, 128))),
    "a hole": safetensors(x=((8,), (0, 32)), y=((4,), (48, 64))),
    "bytes that belong to nothing": safetensors(x=((8,), (0, 32))),
    "another number of elements": safetensors(x=((17,), (0, 64))),
    "an overflow": safetensors(x=((2**62, 4), (0, 64))),
    "a header of 10^12 bytes": safetensors(length=10**12, x=((16,), (0, 64))),
    "the end before the start": safetensors(x=((16,), (64, 0))),
}


def read_all(folder, name: str, content: bytes) -> dict[str, list[float]]:
    (folder / name).write_bytes(content)
    with limited(20, 2 << 30):
        places = stored_tensors(folder, "--model")
        return {key: read_tensor(place.file, key, "--model").flatten().tolist() for key, place in places.items()}


@pytest.mark.parametrize("case", BIN_FILES)
def test_bin_files_that_are_refused(tmp_path, case):
    content, reason = BIN_FILES[case]
    with pytest.raises(UserError, match=f"^--model: {tmp_path}/pytorch_model.bin is .*refused: .*{reason}[^\n]*$"):
        read_all(tmp_path, "pytorch_model.bin", content)


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors_that_are_refused(tmp_path, case):
    with pytest.raises(UserError, match=f"^--model: {tmp_path}/model.safetensors is [^\n]*$"):
        read_all(tmp_path, "model.safetensors", SAFETENSORS[case])


def test_sound_files_made_in_the_same_way(tmp_path):
    """Two tensors of two storages, of which one is a part; the older format; and a parameter."""
    both = saved(x=tensor(), y=tensor((1,), offset=1, key="1", stored=2))
    assert read_all(tmp_path, "pytorch_model.bin", archive(both, ONES, ONES[:8])) == {"x": [1, 2, 3, 4], "y": [2]}
    assert read_all(tmp_path, "pytorch_model.bin", older(saved(x=tensor(before=b"N")))) == {"x": [1, 2, 3, 4]}
    torch.save({"x": torch.nn.Parameter(torch.ones(2)), "y": torch.zeros(0), "z": torch.zeros(0)}, tmp_path / "p.bin")
    content = (tmp_path / "p.bin").read_bytes()
    assert read_all(tmp_path, "pytorch_model.bin", content) == {"x": [1, 1], "y": [], "z": []}


def test_files_of_float8_and_of_later_pickles(tmp_path):
    torch.save({"x": torch.arange(4.0).to(torch.float8_e4m3fn)}, tmp_path / "pytorch_model.bin")
    assert stored_tensors(tmp_path, "--model")["x"][1:] == ("float8_e4m3fn", (4,))
    assert read_tensor(tmp_path / "pytorch_model.bin", "x", "--model").float().tolist() == [0, 1, 2, 3]
    torch.save({"x": torch.ones(4)}, tmp_path / "pytorch_model.bin", pickle_protocol=4)
    with pytest.raises(UserError, match="refused: its pickle is of protocol 4 or later; save it again as safetensors"):
        stored_tensors(tmp_path, "--model")


@pytest.mark.parametrize("name", ["x" * 5000, "../x.bin", "a/b.bin", "a\0b"])
def test_an_index_names_files_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match=r"^--model: .*index\.json is damaged \(no weight_map of file names\)"):
        stored_tensors(tmp_path, "--model")
