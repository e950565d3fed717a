"""utils/terminal.py: what a command prints is escaped, bars still move, and a closed pipe is no error."""

import io
import json
import os
import subprocess
import sys

import pytest
from tqdm import tqdm

from tests.helpers.tiny_run import REPOSITORY, clean_environment
from utils.terminal import SafeStream, printable

START = "import sys, warnings\nfrom utils.errors import UserError\nfrom utils.flags.parser import entry_point\n"


def run(body: str, after: str = "") -> subprocess.CompletedProcess:
    """A command whose `main` is this, in a process of its own, its output in pipes; `after`: more for the shell."""
    code = f"{START}@entry_point\ndef main(argv):\n    {body}\nmain([])"
    words = ["bash", "-c", f'set -o pipefail; "$@" {after}', "bash", sys.executable, "-c", code]
    environment = clean_environment() | {"PYTHONUNBUFFERED": ""}  # which some machines set
    return subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, timeout=60)


def test_every_character_that_a_terminal_obeys():
    """JSON strings give them back; tabs, line feeds and all languages stay."""
    evil = [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xD800, 0xDFFF]
    for code in evil:
        assert printable(f"a{chr(code)}b") == f"a\\u{code:04x}b"
        assert json.loads(printable(json.dumps(chr(code), ensure_ascii=False))) == chr(code)
    text = "tab\tline\n¡ café 你好 שלום नमस्ते 😀 \\ "
    assert printable(text) == text


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        ("UserError", 2, "error: a \\u001b[2J b\\udcff"),  # one line, whatever is in it
        ("RuntimeError", 1, "RuntimeError: a \\u001b[2J\\u000db\\udcff"),
    ],
)
def test_errors_warnings_and_logs_of_libraries(error, code, last):
    said = "import logging; warnings.warn('x\\x1b\\x9b'); logging.warning('y\\x07')"
    result = run(f"{said}; raise {error}('a \\x1b[2J\\rb\\udcff')")
    shown = result.stderr.decode().split("\n")
    assert (result.returncode, result.stdout, shown[-2:]) == (code, b"", [last, ""])
    assert "WARNING:root:y\\u0007" in shown and any("UserWarning: x\\u001b\\u009b" in line for line in shown)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    """Some libraries read such a folder and some do not: one line for all of them."""
    words = ["-m", "ppo.report", os.fsdecode(os.fsencode(tmp_path) + b"/x\xff")]
    result = subprocess.run([sys.executable, *words], cwd=REPOSITORY, env=clean_environment(), capture_output=True)
    assert result.returncode == 2 and result.stderr.decode() == (
        f"error: '{tmp_path}/x\\udcff' on the command line, or in --config, is not UTF-8; "
        "change it, or rename the file\n"
    )


def test_bars_move_and_what_they_show_does_not():
    """What tqdm writes through the stream is what it would write without, but for the text."""
    shown = {}
    for text in ("plain", "a\rb\x1b[A"):
        streams = {False: io.StringIO(), True: io.StringIO()}
        for safe, raw in streams.items():
            stream = SafeStream(raw, bars=True) if safe else raw
            with tqdm(total=2, file=stream, desc=text, mininterval=0, bar_format="{desc} {n_fmt}") as outer:
                outer.write(text, file=stream)  # with one bar: tqdm clears several in any order
                for _ in tqdm(range(2), file=stream, mininterval=0, bar_format="{n_fmt}"):
                    outer.update()
        shown[text] = [raw.getvalue() for raw in streams.values()]
    plain, safe = shown["plain"]
    assert plain == safe and "\x1b[A" in plain and "\r" in plain
    plain, safe = shown["a\rb\x1b[A"]
    assert "a\rb" in plain and "a\rb" not in safe and "a\\u000db\\u001b[A 1" in safe
    SafeStream(raw := io.StringIO()).write("\r\x1b[A")
    assert raw.getvalue() == "\\u000d\\u001b[A"  # bars are for standard error


@pytest.mark.parametrize(("stream", "after"), [("stdout", "| head -c1"), ("stderr", "3>&1 >/dev/null 2>&3 | head -c1")])
@pytest.mark.parametrize("options", ["", ", end='', flush=True"])
def test_a_closed_pipe_is_no_error(stream, after, options):
    """The command goes on to its end, exits with its own code and shows no error; other writers find no closed pipe."""
    write = f"import os; os.write(sys.{stream}.fileno(), b'x')"
    result = run(f"for i in range(50000): print(i, file=sys.{stream}{options})\n    {write}; sys.exit(7)", after)
    assert (result.returncode, result.stdout, result.stderr) == (7, b"0", b"")


def test_other_errors_of_a_stream_are_raised():
    result = run("print('x' * 9999)", ">/dev/full")
    assert result.returncode == 2 and b"No space left on device" in result.stderr
