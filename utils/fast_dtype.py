"""Chooses --dtype auto: the dtype that this machine multiplies fast. `python -m utils.fast_dtype` prints it.

A CPU without bf16 instructions (AVX-512 or AMX on x86) multiplies it in software: 80 times slower than float32 on an
AMD EPYC of 2021. GPUs before Ampere lack it as well.
"""

import time

import torch

from utils.device import device as own_device

SIZE, ROUNDS, TOLERANCE = 192, 3, 4.0  # of the matrices; the fastest counts; slower than float32 by this is slow


def fast_dtype(device: torch.device) -> str:
    """ "bf16" if the device multiplies it fast, else "fp32". Measured on a CPU, in under a tenth of a second."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _seconds(torch.bfloat16) < TOLERANCE * _seconds(torch.float32) else "fp32"


def _seconds(dtype: torch.dtype) -> float:
    """Seconds of one product on one thread; several threads would wait for each other on a busy machine."""
    matrix = torch.ones(SIZE, SIZE, dtype=dtype)
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(ROUNDS + 1):  # the first is a warm-up
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return min(times[1:])


if __name__ == "__main__":
    print(fast_dtype(own_device()))
