"""benchmarks/timing.py on the CPU: what it says of work whose time, memory or operations are known."""

import time

import torch

from benchmarks.timing import kernels, measure, peak_of


def test_time_memory_and_kernels() -> None:
    timing = measure(lambda: time.sleep(0.02), repeats=3, warm_up=1)
    assert 0.02 <= timing.device < 0.2 and 0.02 <= timing.host < 0.2 and 0 <= timing.spread < 10
    _, before = peak_of(lambda: None)
    total, peak = peak_of(lambda: float(torch.ones(1 << 28, dtype=torch.uint8).sum()))  # 0.25 GiB, freed again
    assert total == 1 << 28 and peak >= before and peak_of(lambda: None)[1] == peak
    x = torch.ones(512, 512)
    found, _ = kernels(lambda: [x @ x for _ in range(3)] + [x.sum()])
    counts = {kernel.name: kernel.count for kernel in found}
    assert (counts["aten::mm"], counts["aten::sum"]) == (3, 1)
    assert found[0].name == "aten::mm" and found[0].seconds > found[-1].seconds
