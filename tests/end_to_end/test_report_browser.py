"""The page of a report in Chromium: search, order and filters work, nothing is fetched or wider than a phone."""

import json
import re
import shutil
import subprocess

import pytest

from tests.helpers.run_folder import HOSTILE, STEP, judged, make_run
from utils.report.page import page_of

# The outer page looks into the report, which is 390 pixels wide, and writes down what it finds.
OUTER = """<!DOCTYPE html><iframe src="page.html" style="width:390px;height:800px;border:0"></iframe>
<pre id="found"></pre>
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, form = page.getElementById("filter"), found = {};
  const answers = () => [...page.querySelectorAll("#samples .sides > div")]
    .filter(x => !x.hidden && !x.closest("article").hidden).map(x => x.querySelector("pre").textContent);
  const choose = (name, value) => {
    form.elements[name].value = value;
    form.elements[name].dispatchEvent(new Event("input", { bubbles: true }));
  };
  found.width = [page.documentElement.scrollWidth, page.documentElement.clientWidth];
  found.fetched = frame.contentWindow.performance.getEntriesByType("resource").length;
  found.hidden = form.hidden;
  for (const order of ["newest", "highest", "lowest", "shortest"]) {
    choose("order", order);
    found[order] = answers();
  }
  choose("words", "PEAR two");
  found.words = [answers(), form.elements.count.value];
  choose("words", "");
  choose("held", "1");
  found.held = answers();
  choose("step", "1");
  found.step = answers();
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""
SAMPLES = [
    {"step": 1, "prompt": "one", "answer": "middle apple", "score": 0.5},
    {"step": 2, "prompt": "two", "answer": "a long pear with more words", "score": -1.0},
    {"step": 3, "prompt": "three", "answer": "pear", "score": 2.0},
    {"step": 1, "held_out": True, "prompt": "four", "answer": "first try", "score": 0.0},
    {"step": 3, "held_out": True, "prompt": "four", "answer": "then again", "score": 0.25},
]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_page_in_a_browser_as_wide_as_a_phone(tmp_path):
    table = {"a row " * 5: {name: [1.23456, -12345.6, 2.0] for name in ("before", "after", "difference")}}
    answers = [{"prompt": "p" * 300, "answer": HOSTILE, "answer_after": "w" * 300}]
    comparison = {"table": table, "answers": answers}
    run = make_run(tmp_path / ("long" * 40), [STEP] * 3, SAMPLES, comparison, changed_flags={"lr": "x" * 200})
    (tmp_path / "page.html").write_text(page_of([judged(run)]), "utf-8")
    (tmp_path / "outer.html").write_text(OUTER)
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--allow-file-access-from-files", "--hide-scrollbars", "--virtual-time-budget=5000", "--dump-dom"]
    result = subprocess.run([*command, (tmp_path / "outer.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)[1])
    assert found["width"] == [390, 390] and found["fetched"] == 0 and found["hidden"] is False
    middle, long, pear, first, then = (row["answer"] for row in SAMPLES)
    assert found["newest"] == [pear, first, then, long, middle]
    assert found["highest"] == [pear, middle, first, then, long]
    assert found["lowest"] == [long, first, then, middle, pear]
    assert found["shortest"] == [pear, first, then, middle, long]
    assert found["words"] == [[long], "1 answers"]
    assert found["held"] == [first, then] and found["step"] == [first]
