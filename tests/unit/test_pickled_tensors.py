"""`.bin` files read by hand: only a closed list of names, and no tensor that is not wholly in the file."""

import io
import re
import zipfile

import pytest
import torch

from utils.pickled_tensors import UnsafePickle, legacy_tensors, zip_tensors

VALUES = torch.arange(4, dtype=torch.float32)


def saved(zipped: bool) -> bytes:
    """A file of torch.save that holds VALUES as `w`."""
    stream = io.BytesIO()
    torch.save({"w": VALUES}, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def rewritten(change=lambda data: data, compression: int = zipfile.ZIP_STORED) -> io.BytesIO:
    """The zip layout with another outline, or packed otherwise."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(True))) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for record in old.infolist():
            content = old.read(record)
            new.writestr(record.filename, change(content) if record.filename.endswith("data.pkl") else content)
    return stream


def replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 1
    return content.replace(old, new)


def larger(content: bytes) -> bytes:
    """The shape (4,) becomes (8,)."""
    return replaced(content, b"K\x04\x85", b"K\x08\x85")


def test_a_tensor_is_found_where_it_lies():
    for stream, read in ((rewritten(), zip_tensors), (io.BytesIO(saved(False)), legacy_tensors)):
        (dtype, shape, offset) = read(stream)["w"]
        assert (dtype, shape) == ("float32", (4,))
        assert stream.getvalue()[offset : offset + 16] == VALUES.numpy().tobytes()


def test_a_tensor_beyond_its_storage_is_refused():
    """Else it would be read out of what lies behind: another tensor, or the end of the file."""
    with pytest.raises(ValueError, match="w is larger than its storage"):
        zip_tensors(rewritten(larger))
    with pytest.raises(ValueError, match="w is larger than its storage"):
        legacy_tensors(io.BytesIO(larger(saved(False))))


def test_what_does_not_lie_there_as_it_is_is_refused():
    with pytest.raises(ValueError, match="is compressed"):
        zip_tensors(rewritten(compression=zipfile.ZIP_DEFLATED))
    content = saved(False)
    with pytest.raises(ValueError, match="has 5 elements, not 4"):
        legacy_tensors(io.BytesIO(content[:-24] + (5).to_bytes(8, "little") + content[-16:]))
    view, count = re.subn(rb"N(?=tq.Q)", b"\x88", content, flags=re.DOTALL)  # the last of what names a storage
    with pytest.raises(ValueError, match="a view of another storage"):
        legacy_tensors(io.BytesIO(view))
    assert count == 1
    with pytest.raises(EOFError):
        legacy_tensors(io.BytesIO(content[:-20]))


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval", "builtins getattr", "os system", "posix system", "subprocess Popen", "torch load",
        "torch.storage _load_from_bytes", "torch._utils _rebuild_sparse_tensor", "numpy.core.multiarray scalar",
        "collections defaultdict", "_codecs encode", "torch FloatStorage.__init__",
    ],
)  # fmt: skip
def test_no_other_name_is_let_in(name):
    module, word = name.split()
    asks = f"c{module}\n{word}\n.".encode()
    with pytest.raises(UnsafePickle, match=f"^{module}.{word}$"):
        legacy_tensors(io.BytesIO(asks))
    with pytest.raises(UnsafePickle, match=f"^{module}.{word}$"):
        zip_tensors(rewritten(lambda content: asks))
