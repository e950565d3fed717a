"""metrics.jsonl and samples.jsonl with lines that no run wrote: they stay, and nobody stumbles over them."""

import json
import os
import re

import pytest

from ppo.report import main
from tests.helpers.parts import ppo_config
from tests.helpers.tiny_run import refusal
from utils.errors import UserError
from utils.files import disk_errors
from utils.report.read import read_run
from utils.run.folder import cut_lines
from utils.run.resume import check_folder

FOREIGN = [
    b"notes: lr was too high here", b"", b"[1, 2]", b"3", b'{"loss": 1.0}', b'{"step": "4"}', b'{"step": 4.0}',
    b'{"step": NaN}', b'{"step": true}', b'{"step": -4}', b'{"step": 4, "a": "\\ud800"}', b"\xff\xfe", b"x" * 10**6,
    b"[" * 10**5, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 1e999}',
    b'{"step": 10000000000000000000}',
]  # fmt: skip


def test_lines_of_later_steps_go_and_foreign_ones_stay(tmp_path):
    """Losing a line of the user's is worse than keeping it; the order stays, too."""
    own = [json.dumps({"step": step, "loss": 0.5, "text": "é\u2028"}).encode() for step in range(1, 6)]
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join([*own[:2], *FOREIGN, *own[2:], b""]))
    cut_lines(str(file), 3)
    assert file.read_bytes() == b"\n".join([*own[:2], *FOREIGN, own[2], b""])
    cut_lines(str(file), 0)
    assert file.read_bytes() == b"\n".join([*FOREIGN, b""])


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        (b'{"step": 2, "lo', b""), (b"\0\0\0", b""), (b"a note", b"a note\n"), (b'{"step": 2}', b'{"step": 2}\n'),
        (b'{"step": 3}', b""),
    ],
)  # fmt: skip
def test_only_an_unfinished_line_of_a_run_goes(tmp_path, end, kept):
    """What a kill or a power cut left; the next line of the run must not be joined to it."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + end)
    cut_lines(str(file), 2)
    assert file.read_bytes() == b'{"step": 1}\n' + kept


def test_a_pipe_is_no_file_of_metrics(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_1" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="run cannot be written: not a regular file"), disk_errors("run"):
        cut_lines(str(tmp_path / "metrics.jsonl"), 3)
    with pytest.raises(UserError, match=r"--model_save_path: .*/metrics.jsonl is not a regular file; move it"):
        check_folder(ppo_config(model_save_path=str(tmp_path)))


@pytest.fixture
def run(tmp_path):
    """The folder of a run of two steps, with foreign lines."""
    folder = tmp_path / "run$x"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    rows = [b'{"step": 1, "score_mean": 0.25}', b'{"step": 2, "score_mean": "0.5", "kl_ref": 1' + b"0" * 400 + b"}"]
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*FOREIGN, *rows, b""]))
    sample = {"step": 2, "prompt": "Why?", "answer": "Because.", "score": 0.5}
    (folder / "samples.jsonl").write_bytes(b"\n".join([*FOREIGN, json.dumps(sample).encode(), b'{"step": 3}', b""]))
    return folder


def test_a_report_passes_over_foreign_lines(run):
    main([str(run)])
    page = (run / "report.html").read_text("utf-8")
    assert page.count("<article") == 1 and "<pre>Because.</pre>" in page
    assert "from 0.25 at step 1 to 0.25 at step 1" in page and "KL to the reference" not in page


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"answers": []}, "table: .* required"),
        ({"table": {"kl": {"after": [1, 2]}}, "answers": []}, "table.kl.after: .* 3 items"),
        ({"table": {"kl": {"after": [1, 2, "3"]}}, "answers": []}, "table.kl.after.2: .* number"),
        ({"table": {}, "answers": [{"prompt": "a", "answer": 3}]}, "answers.0.answer: .* string"),
        ({"table": {}, "answers": [], "judge": {"model": "<b>", "pairs": [{"policies": [0]}]}}, "policies: .* 2 items"),
        ({"table": {}, "answers": [], "tables": None}, "tables: .* list"),
    ],
)
def test_a_damaged_comparison_is_left_out(run, content, reason):
    (run / "comparison.json").write_text(json.dumps(content))
    found = read_run(run)
    (remark,) = found.remarks
    assert found.comparison is None and found.last_step == 2
    assert re.fullmatch(f"comparison.json is left out, since it is damaged.*{reason}.*: run ppo.compare again.", remark)


def test_a_report_of_damaged_flags_is_refused(run, capfd):
    (run / "config.json").write_text('{"critic_pretrain_steps": "1"}')
    error = refusal(main, [str(run)], capfd)
    assert f"RUN: {run / 'config.json'} is damaged or not readable (" in error
    assert re.search("critic_pretrain_steps: .* valid integer", error)
    assert not (run / "report.html").exists()
