"""Limits the time and the memory of a block of Python code, in the main thread."""

import contextlib
import resource
import signal
import time
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def limited(seconds: float, num_bytes: int) -> Iterator[None]:
    """Raises TimeoutError in the block after `seconds` of the main thread's CPU time, and MemoryError once the process
    takes `num_bytes` more of address space. Cannot interrupt one long instruction, such as 7 ** 99999999.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize() + num_bytes
    limits = [size, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    end = time.thread_time() + seconds

    def stop(number: int, frame: FrameType | None) -> None:
        if (left := end - time.thread_time()) <= 0:
            raise TimeoutError(f"it takes more than {seconds:g} s")
        signal.setitimer(signal.ITIMER_VIRTUAL, max(left, 0.01))  # which counts the time of all threads

    before = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
