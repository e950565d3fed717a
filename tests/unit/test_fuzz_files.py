"""Arbitrary records in every kind of file: values and places come back, and damage is refused with file and line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.formats.records import FLAG
from data.sources import parse_sources, parts_of
from tests.helpers.fuzzing import ASKED, ends, search, texts, values, whole
from utils.errors import UserError

PACK = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}  # fmt: skip
PACKED = sorted(PACK.keys() - {""})
fuzz = search(parts=4) if ASKED else settings(search(), max_examples=25)
cells = st.text(whole, max_size=12).map(lambda text: text.replace("\r", " "))
rows = st.lists(st.fixed_dictionaries({"prompt": cells, "n": st.integers(-9, 9)}), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def records_of(file) -> list[tuple]:
    """(place, value) of all records."""
    parts, _ = parts_of(parse_sources([str(file)], FLAG)[0], FLAG)
    found = [(record.source, record.value) for part in parts for record in part.records()]
    assert [raw.source for part in parts for raw in part.raw()] == [place for place, _ in found]
    return found


def written(folder, name: str, content: bytes):
    """A file, compressed by its last ending."""
    file = folder / name
    file.write_bytes(PACK.get(file.suffix, bytes)(content))
    return file


def lines_of(items: list) -> list[str]:
    """A line of JSON per item; halves of surrogate pairs are escapes."""
    return [json.dumps(item) for item in items]


@fuzz
@given(st.lists(st.none() | values, min_size=1, max_size=6), st.sampled_from(sorted(PACK)), st.booleans())
def test_fuzz_json_lines(folder, items, ending, has_break):
    """None draws a blank line. Each value has the number of its line."""
    text = "\n".join("" if item is None else json.dumps(item) for item in items) + "\n" * has_break
    file = written(folder, f"x.jsonl{ending}", text.encode())
    read = enumerate(json.loads(json.dumps(items)), start=1)  # two halves of a surrogate pair become one
    expected = [(f"{file}:{k}", item) for k, item in read if item is not None]
    with ends():
        assert repr(records_of(file)) == repr(expected)  # NaN is not equal to itself


@fuzz
@given(
    st.lists(values, max_size=6), st.integers(0, 6), st.sampled_from(sorted(PACK)), st.sampled_from([b'{"a', b"\xff"])
)
def test_fuzz_broken_lines(folder, items, place, ending, broken):
    lines = [line.encode() for line in lines_of(items)]
    place = min(place, len(lines))
    file = written(folder, f"x.jsonl{ending}", b"\n".join([*lines[:place], broken, *lines[place:]]))
    with ends(), pytest.raises(UserError, match=rf"^{re.escape(str(file))}:{place + 1}: "):
        records_of(file)


@fuzz
@given(st.lists(values, min_size=1, max_size=6), st.sampled_from(sorted(PACK)), st.sampled_from([None, 1]))
def test_fuzz_json_lists(folder, items, ending, indent):
    file = written(folder, f"x.json{ending}", json.dumps(items, indent=indent).encode())
    with ends():
        expected = [(f"{file}:record {k}", item) for k, item in enumerate(json.loads(json.dumps(items)), start=1)]
        assert repr(records_of(file)) == repr(expected)


@fuzz
@given(st.lists(texts.filter(lambda text: "\n" not in text), min_size=1, max_size=6), st.sampled_from(sorted(PACK)))
def test_fuzz_text_lines(folder, lines, ending):
    lines = [line.encode("utf-8", "replace").decode().replace("\r", " ").lstrip("\ufeff") for line in lines]
    file = written(folder, f"x.txt{ending}", "\n".join(lines).encode())
    with ends():
        places = [f"{file}:{k}" for k, line in enumerate(lines, start=1) if line.encode().strip()]
        assert [place for place, _ in records_of(file)] == places


@fuzz
@given(rows, st.sampled_from([("csv", ","), ("tsv", "\t")]), st.sampled_from(sorted(PACK)))
@example([{"prompt": "a\n\nb", "n": 1}, {"prompt": "c", "n": 2}], ("csv", ","), ".gz")
def test_fuzz_csv(folder, items, kind, ending):
    """Cells may contain line breaks: the place of a record is the line on which it begins."""
    name, delimiter = kind
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, ["prompt", "n"], delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    places = []
    for item in items:
        places.append(f"x.{name}{ending}:{buffer.getvalue().count(chr(10)) + 1}")
        writer.writerow(item)
    file = written(folder, f"x.{name}{ending}", buffer.getvalue().encode())
    with ends():
        found = records_of(file)
    assert [place for place, _ in found] == [str(folder / place) for place in places]
    for (_, value), item in zip(found, items, strict=True):
        assert value["n"] == str(item["n"])
        assert isinstance(value["prompt"], list | dict) or (value["prompt"] or "") == item["prompt"]


@fuzz
@given(rows, st.integers(0, 4), st.sampled_from(sorted(PACK)))
def test_fuzz_csv_that_is_not_utf8(folder, items, place, ending):
    lines = ["prompt,n", *(f"{item['n']},{item['n']}" for item in items)]
    place = min(place, len(lines) - 1)
    content = [line.encode() + b"\xff" * (k == place) for k, line in enumerate(lines)]
    file = written(folder, f"x.csv{ending}", b"\n".join(content))
    with ends(), pytest.raises(UserError, match=rf"^{re.escape(str(file))}:{place + 1}: not UTF-8"):
        records_of(file)


@fuzz
@given(rows)
def test_fuzz_tables(folder, items):
    table = pyarrow.Table.from_pylist(items)
    pyarrow.parquet.write_table(table, folder / "x.parquet", row_group_size=2)
    with pyarrow.OSFile(str(folder / "x.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("x.parquet", "x.arrow"):
        with ends():
            places = [f"{folder / name}:row {k}" for k in range(1, len(items) + 1)]
            assert records_of(folder / name) == list(zip(places, items, strict=True))


@fuzz
@given(st.lists(values, min_size=1, max_size=6), st.sampled_from(PACKED), st.data())
def test_fuzz_damaged_compression(folder, items, ending, data):
    """A damaged file is refused, with its name, or its content is what was written. pyarrow's .zst has no checksum."""
    content = PACK[ending]("\n".join(lines_of(items)).encode())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content = content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
    file = folder / f"x.jsonl{ending}"
    file.write_bytes(content)
    with ends():
        try:
            found = records_of(file)
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            return
    expected = json.loads(json.dumps(items)) if content else []  # an empty file has no records
    assert ending == ".zst" or repr([value for _, value in found]) == repr(expected)


@fuzz
@given(
    st.sampled_from(["x.parquet", "x.arrow", "x.csv", "x.tsv", "x.txt", "x.json", "x.csv.gz"]), st.binary(max_size=60)
)
def test_fuzz_any_bytes(folder, name, content):
    """Whatever a file holds, it is read or refused with its name."""
    (folder / name).write_bytes(content)
    with ends():
        try:
            records_of(folder / name)
        except UserError as error:
            assert str(folder / name) in str(error) and "\n" not in str(error)
