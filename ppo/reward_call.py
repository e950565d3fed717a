"""Calls users' functions within a limit of time, and says where in their code they fail or hang."""

import asyncio
import contextlib
import functools
import os
import signal
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

from utils.errors import HungError, UserError

LIBRARY = os.path.dirname(os.__file__)
AGAIN = 1.0  # seconds between interruptions of a function that is late
MARGIN = 1.0  # seconds after the limit at which an async function that does not await is interrupted


class _Late(BaseException):
    """Raised by the alarm in the user's code, which must not take it for an error of its own. args: file and line."""


def call_within(timeout: float, label: str, function: Callable[[], Any], margin: float = 0.0) -> Any:
    """Returns function(). Raises UserError if it fails or takes more than `timeout` seconds; 0: no limit.

    margin: seconds more, for a function that has the limit itself. Only in the main thread. Code that does not return
    to Python is not interrupted; --hang_timeout ends it.
    """
    try:
        with _alarm(timeout and timeout + margin):
            return function()
    except _Late as late:
        while isinstance(late.__context__, (_Late, HungError)):  # the first, if more came in code that cleans up
            late = late.__context__
        raise late if isinstance(late, HungError) else _too_long(label, timeout, *late.args) from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{label} failed: {failure_of(error)}") from error


def call_together(timeout: float, functions: list[tuple[str, Callable[[], Awaitable]]]) -> list:
    """Returns the results of async functions with their labels, run in one event loop; otherwise as `call_within`."""

    async def one(label: str, function: Callable[[], Awaitable]) -> Any:
        task = asyncio.ensure_future(function())
        task.add_done_callback(_read)
        if not (await asyncio.wait([task], timeout=timeout or None))[0]:
            frame = task.get_stack()[-1]
            raise _too_long(label, timeout, frame.f_code.co_filename, frame.f_lineno)
        try:
            return task.result()
        except (Exception, SystemExit) as error:
            raise UserError(f"{label} failed: {failure_of(error)}") from error

    async def every() -> list:
        return await asyncio.gather(*(one(*pair) for pair in functions))

    labels = " or ".join(label for label, _ in functions)
    return call_within(timeout, labels, lambda: _run(every()), MARGIN)


def _run(every: Coroutine) -> list:
    """Returns the result of a coroutine. If it fails or is interrupted, whatever is left in the loop is cancelled."""
    try:
        return _runner().run(every)
    except BaseException:
        runner = _runner()
        _runner.cache_clear()
        runner.close()
        raise


@functools.cache
def _runner() -> asyncio.Runner:
    """Returns what runs async functions: always the same event loop, which clients and locks in user code belong to."""
    return asyncio.Runner()


def failure_of(error: BaseException) -> str:
    """Returns where in the user's code an error was raised, on one line: "file.py:12: KeyError: 'x'; fix it"."""
    last = error if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"{last.filename}:{last.lineno}: {reason}; fix it"


def _read(task: asyncio.Task) -> None:
    """Takes the exception of a task that a signal ended; asyncio prints those that nobody takes."""
    if not task.cancelled():
        task.exception()


def _too_long(label: str, timeout: float, file: str, line: int) -> HungError:
    text = f"{label} took more than {timeout:g} s (--reward_fn_timeout), in {file}:{line}; raise it, or limit the wait"
    return HungError(text)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Context in which _Late is raised after so many seconds, and again while code that cleans up waits; 0: never."""

    def late(number: int, frame) -> None:
        while frame.f_code.co_filename.startswith(LIBRARY):  # to the user's line, which waits in a call of the library
            frame = frame.f_back
        raise _Late(frame.f_code.co_filename, frame.f_lineno)

    if not seconds:
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
