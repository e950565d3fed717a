"""What the machine is and can do: versions, a matrix product, copies within the device and to the host and back."""

import os
import platform
import shutil
import subprocess

import psutil
import torch

from benchmarks.timing import GIB, copy_rate, matrix_rate, measure
from tests.gpu.report import Report
from utils.engine.engine import device

SIZE, TOY_SIZE = 4 * 10**9, 10**6  # bytes of the copies between host and device
STATE = "name,memory.total,driver_version,pstate,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


def check(toy: bool, report: Report) -> None:
    """Figures: TFLOP/s, TB/s read and written, GB/s of copies, microseconds of the host per kernel that it launches."""
    place = device()
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True) if shutil.which("g++") else None
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    report(
        kernel=platform.release(), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
        nccl=".".join(map(str, nccl)), nvcc=shutil.which("nvcc"), cores=os.cpu_count(),
        compiler=compiler and compiler.stdout.splitlines()[0],
        host_memory_gib=round(psutil.virtual_memory().total / GIB),
    )  # fmt: skip
    tflops = matrix_rate(place, torch.bfloat16, 256 if toy else None) / 1e12
    report(bf16_tflops=tflops, fp32_tflops=matrix_rate(place, torch.float32, 256 if toy else None) / 1e12)
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={STATE}", "--format=csv,noheader"]
        report(nvidia_smi_after_product=subprocess.run(command, capture_output=True, text=True).stdout.strip())
    report(device_copy_tb_per_second=copy_rate(place, TOY_SIZE if toy else None) / 1e12)
    small = torch.zeros(16, device=place)
    host = measure(lambda: [small.add_(1) for _ in range(1000)], repeats=5).host  # kernels of almost no work
    report(host_microseconds_per_launch=1e6 * host / 1000)
    size = TOY_SIZE if toy else SIZE
    on_device = torch.zeros(size, dtype=torch.uint8, device=place)
    for kind, pinned in (("pageable", False), ("pinned", True)):
        on_host = torch.ones(size, dtype=torch.uint8, pin_memory=pinned and place.type == "cuda")
        there = measure(lambda source=on_host: on_device.copy_(source, non_blocking=True), repeats=2, warm_up=1)
        arrived = on_device.min() == 1
        on_device.fill_(2)
        back = measure(lambda target=on_host: target.copy_(on_device, non_blocking=True), repeats=2, warm_up=1)
        rates = {f"{kind}_to_device_gb_per_second": there, f"{kind}_to_host_gb_per_second": back}
        report(**{name: size / timing.device / 1e9 for name, timing in rates.items()})
        report.expect(bool(arrived) and bool(on_host.min() == 2), f"{kind} copies have not brought what they should")
