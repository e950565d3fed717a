"""Notices of --notify_url: a POST of JSON when a run finishes, stops, fails or looks like a collapse. No torch.

Only rank 0 sends. Nothing that happens to a notice stops or delays training: threads of their own send it, and the end
of the process waits a few seconds for them at most.
"""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator

from utils.errors import UserError, problem_of

TIMEOUT = 5.0  # seconds for an answer, and for all notices at the end of the process
MAX_MESSAGE = 1000  # characters
HIDDEN = "***"  # what takes the place of a URL, which may hold a secret, wherever flags are shown or written
OUT_OF_TIME = 75  # as in utils/run/stop_signal.py, which imports torch
_FLAG = "--notify_url"


class Notifier:
    """Sends the notices of this process's run. facts: what each notice says; `update` changes it."""

    current: "Notifier | None" = None

    def __init__(self, url: str, run_name: str):
        self._url, self._threads, self._has_warned = url, [], False
        self.facts: dict[str, object] = {"run_name": run_name, "step": 0, "total_steps": None}

    def send(self, event: str, message: str) -> None:
        """Sends a notice, and returns at once."""
        content = {"event": event} | self.facts | {"message": message[:MAX_MESSAGE]}
        thread = threading.Thread(target=self._post, args=(json.dumps(content).encode(),), name="notice", daemon=True)
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        thread.start()

    def wait(self) -> None:
        """Waits until all notices are sent, but not longer than TIMEOUT."""
        deadline = time.monotonic() + TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            self._warn("no answer")

    def _post(self, content: bytes) -> None:
        import urllib.request  # takes time that `--help` does not need

        try:
            request = urllib.request.Request(self._url, content, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT):
                pass
        except urllib.request.HTTPError as error:
            self._warn(f"HTTP status {error.code}")
        except Exception as error:  # noqa: BLE001 - the run goes on. The texts of some errors hold the URL
            reason = getattr(error, "reason", error)
            self._warn(getattr(reason, "strerror", None) or type(reason).__name__)

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            print(f"warning: {_FLAG}: a notice could not be sent ({reason}); the run goes on", flush=True)


def start_notices(config, is_sender: bool) -> None:
    """Hides the URL in the flags and in sys.argv, which are shown and written, and notifies from now on.

    A URL of the form env:NAME is in the variable NAME, and needs no hiding. Raises UserError if it is no URL.
    """
    url = config.notify_url
    if url and not url.startswith("env:"):
        config.notify_url = HIDDEN
        sys.argv[:] = [word.replace(url, HIDDEN) for word in sys.argv]
    if url and is_sender:
        name = config.run_name or os.path.basename(os.path.abspath(config.model_save_path))
        Notifier.current = Notifier(_checked(url), name)


def _checked(url: str) -> str:
    place = _FLAG
    if url.startswith("env:"):
        place = f"{_FLAG} {url}"
        url = os.environ.get(url.removeprefix("env:"), "")
    try:
        parts = urllib.parse.urlsplit(url)
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        is_url = False
    if not is_url or not url.isascii() or not url.isprintable() or " " in url:
        raise UserError(f"{place} is not a URL: pass http://… or https://…, or env:NAME for the URL in a variable")
    return url


def update(step: int | None = None, total_steps: int | None = None, values: dict[str, float] | None = None) -> None:
    """Tells later notices about the run: step and total, and score and KL of the step's metrics."""
    if Notifier.current:
        new = {"step": step, "total_steps": total_steps}
        for name, key in (("score", "score_mean"), ("kl", "kl_ref"), ("loss", "loss")):
            value = (values or {}).get(key, math.nan)
            new[name] = value if math.isfinite(value) else None
        Notifier.current.facts |= {name: value for name, value in new.items() if value is not None}


def notify(event: str, message: str) -> None:
    """Sends a notice, if --notify_url is given."""
    if Notifier.current:
        Notifier.current.send(event, message)


def end_notices() -> None:
    """Waits for the notices that are being sent. Nothing is sent from now on."""
    if Notifier.current:
        Notifier.current.wait()
    Notifier.current = None


@contextlib.contextmanager
def notices() -> Iterator[None]:
    """Context of a command: at its end a notice says how it ended, if `start_notices` was called in it.

    It does not wait, so that an error is printed at once; `end_notices` has to follow.
    """
    event, message = "finished", "all steps are done"
    try:
        yield
    except KeyboardInterrupt:
        event, message = "stopped", "Ctrl-C"
        raise
    except SystemExit as end:
        event, message = _meaning(end.code)
        raise
    except Exception as error:
        event, message = "failed", problem_of(error) or f"{type(error).__name__}: {error}"
        raise
    finally:
        notify(event, message)


def _meaning(code: object) -> tuple[str, str]:
    """Returns the event and the message for the code with which a run exits."""
    if code == OUT_OF_TIME:
        return "stopped", "--max_hours is over"
    if isinstance(code, int) and code - 128 in set(signal.Signals):
        return "stopped", signal.Signals(code - 128).name
    return ("failed", f"exit code {code}") if code else ("finished", "all steps are done")
