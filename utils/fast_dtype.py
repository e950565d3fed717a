"""Which dtype this machine multiplies fast:   python -m utils.fast_dtype    prints bf16 or fp32.

A CPU without bf16 instructions (AVX-512 or AMX on x86) multiplies it in software: 80 times slower than float32 on an
AMD EPYC of 2021. GPUs before Ampere lack it as well.
"""

import time
from collections.abc import Callable

import torch

from utils.device import device as own_device

SIZE, ROUNDS, TOLERANCE = 192, 3, 4.0  # of the matrices; the best of so many; times float32's time


def fast_dtype(device: torch.device) -> str:
    """ "bf16" where it pays, else "fp32". On a CPU this is measured, in under a tenth of a second."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _seconds(torch.bfloat16) < TOLERANCE * _seconds(torch.float32) else "fp32"


def warn_of_slow_dtype(dtype: str, device: torch.device, say: Callable[[str], None]) -> None:
    """Says a sentence to those who asked for bf16 where it is slow."""
    if dtype == "bf16" and fast_dtype(device) != "bf16":
        say(f"warning: this {device.type.upper()} multiplies bf16 in software, many times slower than --dtype fp32")


def _seconds(dtype: torch.dtype) -> float:
    """On one thread: several wait for each other longer than either product takes when something else has a core."""
    matrix = torch.ones(SIZE, SIZE, dtype=dtype)
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(ROUNDS + 1):  # the first one warms up
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return min(times[1:])


if __name__ == "__main__":
    print(fast_dtype(own_device()))
