"""benchmarks/timing.py on the CPU: what it says of work whose time, memory or operations are known."""

import time

import torch

from benchmarks.timing import kernels, measure, peak_of, timed


def test_times_are_those_of_the_function() -> None:
    calls = []

    def sleep() -> str:
        calls.append(time.sleep(0.02))
        return "slept"

    result, seconds = timed(sleep)
    assert result == "slept" and 0.02 <= seconds < 0.2
    timing = measure(sleep, repeats=3, warm_up=1)
    assert 0.02 <= timing.device < 0.2 and 0.02 <= timing.host < 0.2 and 0 <= timing.spread < 10
    assert len(calls) == 1 + 1 + 3 + 3  # once alone, to warm up, by the device's clock, by the host's


def test_peak_holds_what_was_freed_again() -> None:
    _, before = peak_of(lambda: None)
    total, after = peak_of(lambda: float(torch.ones(1 << 28, dtype=torch.uint8).sum()))  # 0.25 GiB
    assert total == 1 << 28 and after >= before
    assert peak_of(lambda: None)[1] == after  # a process keeps its peak


def test_kernels_are_counted_by_name() -> None:
    x = torch.ones(512, 512)
    found, launches = kernels(lambda: [x @ x for _ in range(3)] + [x.sum()])
    counts = {kernel.name: kernel.count for kernel in found}
    assert (counts["aten::mm"], counts["aten::sum"], launches) == (3, 1, 0)
    assert found[0].name == "aten::mm" and found[0].seconds > found[-1].seconds
