"""Measure device and host time, peak memory, kernels, and the rates of matrix products and copies.

Device times are from CUDA events if the process uses CUDA, otherwise from the clock; results are medians. Imports only
torch, because TRL's side of a comparison uses it too.
"""

import itertools
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

GIB = 2**30
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")  # host functions


@dataclass(frozen=True)
class Timing:
    """Seconds per call. device: of calls in a row; spread: (largest - smallest) / median; host: until it returns."""

    device: float
    spread: float
    host: float


@dataclass(frozen=True)
class Kernel:
    """Name, number of runs and total seconds of a kernel (on a CPU, of an operation)."""

    name: str
    count: int
    seconds: float


def wait() -> None:
    """Waits until the device has finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(function: Callable, *args, **kwargs) -> tuple:
    """Calls the function once; returns (result, seconds until all streams of the device have finished)."""
    wait()
    start = time.perf_counter()
    result = function(*args, **kwargs)
    wait()
    return result, time.perf_counter() - start


def measure(function: Callable[[], object], repeats: int = 10, warm_up: int = 2) -> Timing:
    """Times a function that uses the current stream without waiting for it."""
    for _ in range(warm_up):
        function()
    marks = [_mark()]
    for _ in range(repeats):
        function()
        marks.append(_mark())
    wait()
    seconds = [_seconds(start, end) for start, end in itertools.pairwise(marks)]
    host = []
    for _ in range(min(repeats, 5)):  # with an empty queue, because a full one blocks the host
        wait()
        start = time.perf_counter()
        function()
        host.append(time.perf_counter() - start)
    wait()
    median = statistics.median(seconds)
    return Timing(median, (max(seconds) - min(seconds)) / median, statistics.median(host))


def _mark() -> torch.cuda.Event | float:
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def peak() -> float:
    """Returns the peak memory of the GPU, or of the process without a GPU, in GiB, since start or `peak_of`."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_of(function: Callable, *args, **kwargs) -> tuple:
    """Calls the function; returns (result, peak memory in GiB during the call, with memory in use before)."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    result = function(*args, **kwargs)
    wait()
    return result, peak()


def kernels(function: Callable[[], object]) -> tuple[list[Kernel], int]:
    """Returns (kernels of one call, longest total time first; number of launches by the host)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        timed(function)
    on_device = torch.autograd.DeviceType.CUDA if len(activities) > 1 else torch.autograd.DeviceType.CPU
    found, launches = [], 0
    for event in profile.key_averages():
        if event.key.startswith(LAUNCHES):
            launches += event.count
        elif event.device_type == on_device:
            micros = event.self_device_time_total if len(activities) > 1 else event.self_cpu_time_total
            found.append(Kernel(event.key, event.count, micros / 1e6))
    return sorted(found, key=lambda kernel: -kernel.seconds), launches


def busy_seconds(function: Callable[[], object], calls: int = 10) -> float:
    """Returns the seconds per call in which the device is busy, without waits for the host."""
    function()
    found, _ = kernels(lambda: [function() for _ in range(calls)])
    return sum(kernel.seconds for kernel in found) / calls


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Returns the FLOP/s of a product of random size x size matrices. size: default 8192 on a GPU, 2048 on a CPU."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / measure(lambda: torch.mm(a, b, out=out)).device


def copy_rate(device: torch.device, size: int | None = None) -> float:
    """Returns bytes read and written per second in a copy on a device. size: bytes; default 4 GiB or 64 MiB (CPU)."""
    size = size or (4 * GIB if device.type == "cuda" else GIB // 16)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / measure(lambda: target.copy_(source)).device
