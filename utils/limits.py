"""Limits the time and the memory of a block of Python code."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def limited(seconds: float, num_bytes: int) -> Iterator[None]:
    """Context that raises TimeoutError after `seconds` of CPU time, and MemoryError for `num_bytes` more of memory.

    The time counts in the main thread only, and between Python's instructions. The memory is that of the process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize() + num_bytes
    limits = [size, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    main = threading.current_thread() is threading.main_thread()

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop) if main else None
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        if main:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        if main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
