"""Every command once, watched: no other machine is asked, nothing is world-writable, data stay data and plain text."""

import html
import os
import re
import stat
import subprocess
import sys
import unicodedata

import pytest

from tests.helpers.tiny_run import REPOSITORY, clean_environment
from tests.security.tiny_jobs import ATTEMPT, CONTROL
from utils.run.logger import RunLogger

NAMES = ["compare", "evaluate", "made", "ppo", "reward", "score", "score two", "sft", "strength"]


def run(folder, *words: str) -> subprocess.CompletedProcess:
    """Without the settings that keep Hugging Face's libraries offline."""
    environment = {key: value for key, value in clean_environment().items() if not key.startswith("HF_")}
    command = [sys.executable, "-m", "tests.security.tiny_jobs", str(folder), *words]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, timeout=400)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The folder of all jobs, beside what they have shown. A process that asked another machine would have ended."""
    folder = tmp_path_factory.mktemp("jobs") / CONTROL
    folder.mkdir()
    result = run(folder)
    assert result.returncode == 0, (result.stdout[-2000:] + result.stderr[-3000:]).decode(errors="replace")
    folder.with_name("stdout").write_bytes(result.stdout)
    folder.with_name("stderr").write_bytes(result.stderr)
    assert sorted(path.name for path in (folder / "jobs").iterdir()) == NAMES
    assert (folder / "jobs" / "ppo" / "out" / "final" / "model.safetensors").is_file()
    return folder


def test_asking_another_machine_is_noticed(tmp_path):
    """A hub id does."""
    result = run(tmp_path, "hub")
    assert result.returncode == ATTEMPT and b"an attempt to reach" in result.stderr


def test_nothing_is_world_writable(jobs):
    """Commands ran with umask 0; a recipe sets its own."""
    paths = [os.path.join(top, name) for top, folders, files in os.walk(jobs / "jobs") for name in folders + files]
    assert len(paths) > 50
    assert [path for path in paths if os.lstat(path).st_mode & stat.S_IWOTH and not os.path.islink(path)] == []
    script = ["bash", "-c", "umask 0; source utils/launch.sh; umask"]
    assert subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip() == "0002"


def test_data_reach_neither_shell_nor_path(jobs):
    """What the records name would have been made, or would stand beside the folders."""
    assert not list(jobs.rglob("ran"))
    assert not [place for place in (REPOSITORY, *REPOSITORY.parents, *jobs.parents) if (place / "ran").exists()]
    assert {path.name for path in jobs.iterdir()} == {"jobs", "materials", "data", "dialogues.json", "pairs.json"}
    written = {path.name for name in NAMES if name != "made" for path in (jobs / "jobs" / name).iterdir()}
    assert written <= {"out", "scored.jsonl", "evaluation"}


TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # of the reading direction


def controls(text: str) -> set[str]:
    """Characters that a terminal or a page would obey."""
    rare = (char for char in set(text) - {"\n", "\t"} if not char.isprintable())
    return {c for c in rare if unicodedata.category(c) in ("Cc", "Cs") or unicodedata.bidirectional(c) in TURNS}


def test_no_control_character_reaches_a_terminal_a_file_or_a_page(jobs):
    """They stand in records, and in the names of data files and of the folder that holds everything."""
    shown, errors = (jobs.with_name(name).read_bytes().decode() for name in ("stdout", "stderr"))
    assert controls(shown) == set()
    assert controls(re.sub(r"(?<!evil)\r|\x1b\[A", "", errors)) == set()  # bars begin so
    assert "$evil\\u000d\\u001b[2J" in shown and "$evil\\u000d\\u001b[2J" in errors and "\\ud800" not in shown
    texts = [path for path in (jobs / "jobs").rglob("*") if path.suffix in (".json", ".jsonl", ".html")]
    found = {str(path.relative_to(jobs)): controls(path.read_text("utf-8")) for path in texts}
    assert len(found) > 20 and set().union(*found.values()) == set(), found
    page = (jobs / "jobs" / "ppo" / "out" / "report.html").read_text("utf-8")
    assert "evil\\u000d" in page and "<img src=x" not in page


def test_texts_in_tensorboard_are_shown_as_they_are(tmp_path):
    """No HTML, link or picture of an answer's own."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    answer = "<img src=//x> ![a](//x) [b](//x) \\[c](//x) `[d](//x)` **e** <//x> http://x\r\u202e &lt;\n# f\n- g"
    log = RunLogger(str(tmp_path), None, 1)
    log.samples(1, [{"answer": answer}])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("samples/text_summary")
    (text,) = event.tensor_proto.string_val
    shown = markdown_to_safe_html(text)
    assert re.findall("<[^>]*>", shown) == ["<p>", "<strong>", "</strong>", "<br>", "<br>", "</p>"]
    told = html.unescape(re.sub("<[^>]*>", "", shown.replace("<br>", "\n")))
    assert told == "answer: " + answer.replace("\r", r"\u000d").replace("\u202e", r"\u202e")
