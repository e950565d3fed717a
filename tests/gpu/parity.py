"""Tiny runs in float32: the metrics on the GPU are those of the CPU, in every ZeRO stage and with every offload."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.gpu.report import Report
from tests.gpu.tiny_runs import expect_close, flags_of, run, start, wait_for
from tests.helpers.tiny_run import build_inputs
from utils.engine.build_lock import unblocked_builds
from utils.engine.engine import deepspeed

SETTINGS = {f"zero_{stage}": {"zero_stage": stage} for stage in range(4)} | {
    "offload_frozen": {"offload_frozen": True},
    "reuse": {"reuse_sampler_logprobs": True},
    "offload_optimizer": {"offload_optimizer": True},  # the last: its C++ code may still be being built
}


def check(toy: bool, report: Report) -> None:
    """Figures: the largest relative difference of a metric per setting, and which metric it is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = build_inputs(folder / "inputs")
        on_cpu = start(flags_of(inputs, folder / "cpu"), folder / "cpu.log", on_cpu=True)
        for setting, changes in SETTINGS.items():
            if setting == "offload_optimizer":
                report(seconds_to_build_cpu_adam=BUILD.result(report.seconds_left()))
            begun = time.monotonic()
            code = run(flags_of(inputs, folder / setting, **changes))
            report(**{f"{setting}_s": round(time.monotonic() - begun, 1)})
            report.expect(code == 0, f"{setting} ends with exit code {code}")
            if setting == "zero_0":
                report.expect(wait_for(on_cpu, folder / "cpu.log", report.seconds_left()) == 0, "the CPU's run fails")
            expect_close(folder / setting, folder / "cpu", report)


def build_cpu_adam() -> float:
    """Builds it, unless that has been done; returns the seconds."""
    begun = time.monotonic()
    with unblocked_builds():
        deepspeed.ops.op_builder.CPUAdamBuilder().load(verbose=False)
    return round(time.monotonic() - begun, 1)


BUILD = ThreadPoolExecutor(1).submit(build_cpu_adam)  # a minute of two cores the first time, so ahead of the check
