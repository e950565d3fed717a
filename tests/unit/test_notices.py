"""utils/notices.py: what a server gets when a run ends or raises an alarm. No server delays a run, or fails it."""

import contextlib
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.helpers.tiny_run import read_metrics, run_flags
from train_ppo import main
from utils import notices
from utils.errors import UserError
from utils.flags.run import RunFlags

SECRET = "T0pSecret"


@contextlib.contextmanager
def server(status: int = 200, stalls: bool = False):
    """A URL of this machine that ends in SECRET, and the bodies it gets. stalls: it never answers."""
    got, end = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if stalls:
                end.wait()
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    found = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{found.server_port}/{SECRET}", got
    finally:
        end.set()
        found.shutdown()
        found.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(notices, "TIMEOUT", 2.0)
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def test_a_run_that_looks_like_a_collapse_and_finishes(inputs, tmp_path, monkeypatch, capfd):
    """Flags, files and output do not hold the URL, whose end may be a secret."""
    out = tmp_path / "<script>"
    with server() as (url, got):
        argv = run_flags(inputs, out, notify_url=url, alarm_score_std=1e6, train_steps=2)
        monkeypatch.setattr(sys, "argv", ["train_ppo.py", *argv])
        main(argv)
        assert notices.Notifier.current is None
    known = [
        {"run_name": "<script>", "step": row["step"], "total_steps": 2, "score": row["score_mean"], "kl": row["kl_ref"]}
        for row in read_metrics(out)
    ]
    (text,) = [each.pop("message") for each in got if each["event"] == "alarm"]
    assert text.startswith("step 1 looks like a collapse: score_std")
    (end,) = [each for each in got if each["event"] == "finished"]
    assert end.pop("message") == "all steps are done"
    assert sorted(got, key=lambda each: each["event"]) == [
        {"event": "alarm"} | known[0],
        {"event": "finished"} | known[1],
    ]  # fmt: skip; of two steps with the same alarm the first one is told
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) > 8 and not [file for file in files if SECRET.encode() in file.read_bytes()]
    shown = "".join(capfd.readouterr())
    assert "--notify_url '***'" in shown and SECRET not in shown
    saved = json.loads((out / "config.json").read_text())
    assert saved["notify_url"] == "***" and "***" in saved["argv"]


@pytest.mark.parametrize("kind", ["user", "crash", "signal", "hours"])
def test_how_a_run_ends(kind, inputs, tmp_path, monkeypatch, capfd):
    """A mistake in the data, a fault in the program, a signal and --max_hours. The URL comes from a variable."""
    flags = {"notify_url": "env:MY_URL", "run_name": "mine", "train_steps": 3}
    if kind == "user":
        flags["data_path"] = tmp_path / "nowhere"
    if kind == "hours":
        flags["max_hours"] = 1e-9
    end = {"crash": RuntimeError("a \x1b[2J"), "signal": SystemExit(143)}.get(kind)
    if end:

        def fails(config, *_):
            raise end

        monkeypatch.setattr("ppo.build.load_data", fails)
    with server() as (url, got):
        monkeypatch.setenv("MY_URL", url)
        with pytest.raises(RuntimeError if kind == "crash" else SystemExit):
            main(run_flags(inputs, tmp_path / "run", **flags))
    event, message, step = {
        "user": ("failed", f"--data_path: {tmp_path}/nowhere", 0), "crash": ("failed", "RuntimeError: a \x1b[2J", 0),
        "signal": ("stopped", "SIGTERM", 0), "hours": ("stopped", "--max_hours is over", 1),
    }[kind]  # fmt: skip
    (notice,) = got
    assert (notice["event"], notice["run_name"], notice["step"]) == (event, "mine", step)
    assert notice["message"].startswith(message)


@pytest.mark.parametrize("kind", ["refuses", "stalls", "status 500"])
def test_no_server_delays_a_run_or_fails_it(kind, capfd):
    """One warning for all notices, without the URL; the end waits TIMEOUT at most."""
    with contextlib.ExitStack() as stack:
        if kind == "refuses":
            with socket.create_server(("127.0.0.1", 0)) as free:
                url = f"http://127.0.0.1:{free.getsockname()[1]}/{SECRET}"
        else:
            url, _ = stack.enter_context(server(500 if "500" in kind else 200, stalls=kind == "stalls"))
        config = RunFlags(model_save_path="run", notify_url=url)
        started = time.monotonic()
        with notices.notices():
            notices.start_notices(config, is_sender=True)
            notices.notify("alarm", "x")
        assert time.monotonic() - started < 1.5
        notices.end_notices()
        assert time.monotonic() - started < 4
    shown = capfd.readouterr().out
    reason = {"refuses": "Connection refused", "stalls": "no answer", "status 500": "HTTP status 500"}[kind]
    assert shown.count("warning") == 1 and SECRET not in shown
    assert f"warning: --notify_url: a notice could not be sent ({reason}" in shown or "TimeoutError" in shown


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "nonsense", "http:///x", "http://a:b@c/", "http://a:99999/", "http://a/\x1b", "env:NONE"],
)
def test_what_is_no_url_is_refused_without_showing_it(url):
    config = RunFlags(model_save_path="run", notify_url=url)
    with pytest.raises(UserError, match="--notify_url") as error:
        notices.start_notices(config, is_sender=True)
    assert url.startswith("env:") or url not in str(error.value)


def test_other_ranks_send_nothing():
    config = RunFlags(model_save_path="run", notify_url="http://127.0.0.1:9/")
    notices.start_notices(config, is_sender=False)
    assert notices.Notifier.current is None and config.notify_url == notices.HIDDEN
