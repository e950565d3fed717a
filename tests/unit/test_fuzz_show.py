"""data.show of arbitrary records: each is used or counted, and nothing of them is code or moves a cursor."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.show import ShowConfig
from data.showing.pages import to_html, to_text
from data.showing.report import report
from tests.helpers.fuzzing import ASKED, dialogue_records, ends, preference_records, search
from utils.errors import UserError

WINDOW = 40
TAGS = {"head", "body", "h1", "h2", "h3", "p", "br", "div", "b", "pre", "span", "table", "tr", "th", "td"}
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@(search() if ASKED else settings(search(), max_examples=50))
@given(
    st.lists(dialogue_records | preference_records, max_size=6), st.booleans(),
    st.sampled_from(["auto", "prompts", "dialogues", "preferences"]), st.sampled_from(["", "moss_en"]),
)  # fmt: skip
def test_fuzz_show(folder, tiny_model, records, ascii_only, kind, template):
    """Any records can be looked at: each is used or counted, and neither output has control characters or tags."""
    file = folder / "show.jsonl"
    text = "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records)
    file.write_bytes(text.encode("utf-8", "surrogatepass" if ascii_only else "replace"))
    flags = {"template": template, "tokenizer_name_or_path": str(tiny_model)} if template else {}
    config = ShowConfig(data_path=[str(file)], kind=kind, context_truncate=WINDOW, **flags)
    with ends():
        try:
            sections, problem = report(config)
        except UserError as error:
            assert "\n" not in str(error)
            return
        text, page = to_text(sections, 90, colour=False), to_html("x", sections)
    said = next(section for section in sections if section.title == "Dropped and changed")
    counts = next(section for section in sections if section.title == "Counts")
    header, row = counts.table
    usable = row[header.index("truncated") - 1]
    assert row[header.index("records")] == len(records) and bool(problem) == (not usable)
    dropped = sum(int(match[1]) for match in re.finditer(r"\w+: (\d+) dropped: ", "\n".join(said.lines)))
    assert usable + dropped == len(records)
    assert not CONTROLS.search(text) and not CONTROLS.search(page)
    assert set(re.findall(r"<(\w+)", page.partition("</style>")[2])) <= TAGS
