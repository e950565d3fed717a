"""utils/run/display.py: plain lines in a log; on a terminal rows that fit 60 columns above a bar that is redrawn."""

import contextlib
import os
import pty
import re
import sys
import termios
import threading
import time

import pytest

from utils.run.display import Display, duration
from utils.terminal import SafeStream

VALUES = {"score_mean": -123.456, "kl_ref": 12.3, "response_length": 1024.0, "eos_fraction": 1.0}


def test_a_log_has_plain_lines(capfd):
    """Every third step, the first one and the last one, with the time that is left: as long as it took so far."""
    shown = Display(total=8, start=0, every=3)
    shown._started = time.perf_counter() - 60.0
    for step in range(1, 9):
        shown.step(step, VALUES | {"score_mean": float(step)})
        shown.advance()
    shown.close()
    out, err = capfd.readouterr()
    assert err == "" and "\r" not in out
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {step}/8" for step in (1, 3, 6, 8)]
    pattern = r"step 3/8: score 3.00, KL 12.30, length 1024.0, ended 100%, \d+\.\d s, \d+\.\d GB, 2m left ▁▅█"
    assert re.fullmatch(pattern, lines[1])  # five more at 20 seconds each: 100 s


def test_a_supervised_line_has_all_numbers(capfd):
    shown = Display(total=20, start=10, every=10)
    for step in range(11, 21):
        shown.step(step, {"loss": 0.5, "lr": 1e-5})
    lines = capfd.readouterr().out.splitlines()
    assert lines[1] == "step 20/20: loss 0.5  lr 1e-05  left 0s" and len(lines) == 2
    shown.step(21, {"loss": float("nan")})  # is in metrics.jsonl, and stops the run
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m"), (3569, "59m"), (3571, "1h00m"), (11100, "3h05m"), (48 * 3600, "2d00h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def on_terminal(monkeypatch, columns: int, work) -> str:
    """What `work` writes, with a terminal of this width as standard output and error."""
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, columns))
    data = []

    def read():
        with contextlib.suppress(OSError):  # the terminal is closed
            while part := os.read(main, 1 << 16):
                data.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with open(terminal, "w", buffering=1, encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", SafeStream(stream))
        patch.setattr(sys, "stderr", SafeStream(stream, bars=True))
        work()
    reader.join()
    os.close(main)
    return b"".join(data).decode()


def test_a_terminal_has_a_table_above_a_bar(monkeypatch):
    """Rows and bar fit 60 columns. Texts of others get lines of their own, and cannot move the cursor."""

    def work():
        shown = Display(total=2500, start=1000, every=1)
        for step in range(1001, 1026):
            shown.step(step, VALUES)
            shown.phase("rollout")
            shown.advance()
            shown._bar.refresh()
            if step == 1010:
                print("of a user \x1b[2J")
            if step == 1020:
                print("<script>\x9b", file=sys.stderr)
        shown.say("answer \x1b[2J\r")
        shown.close()

    text = on_terminal(monkeypatch, 60, work)
    lines = [line for whole in text.split("\r\n") for line in whole.split("\r")]
    rows = [line for line in lines if re.match(r" *\d+/2500 +-?\d", line)]
    assert [int(row.split("/")[0]) for row in rows] == list(range(1001, 1026)) and {len(row) for row in rows} == {59}
    titles = [line for line in lines if line.lstrip().startswith("step ")]
    assert titles == ["     step   score     KL length  EOS  step s memory    left"] * 2  # above the first and the 21st
    bars = [line for line in lines if "step/s" in line]
    assert len(bars) > 20 and max(map(len, bars)) <= 60 and any("rollout" in bar for bar in bars)
    whole = [line.split("\r")[-1].rstrip() for line in text.split("\r\n")]
    assert {"of a user \\u001b[2J", "<script>\\u009b", "answer \\u001b[2J\\u000d"} <= set(whole)
    assert "\x1b" not in text and "\x9b" not in text
