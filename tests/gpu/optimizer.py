"""An optimizer step of 842M elements, DeepSpeed's own and ours in chunks, and a checkpoint of its 10 GB of state.

842M are an eighth of 7B: what each of eight ranks holds.
"""

import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from benchmarks.timing import GIB, peak_of, timed
from utils.engine.engine import TrainEngine, device, init_distributed, shutdown_distributed
from utils.files import sha256
from utils.flags.engine import EngineConfig
from utils.run.checkpoint import MANIFEST, CheckpointWriter

STEPS, LR = 4, 1e-3
TOLERANCE = 1e-2  # of LR: what the weights of both may differ by, as only the gradient's norm is rounded otherwise


class Weights(nn.Module):
    """Weights of normal deviation 0.02, and a loss with a gradient of norm 2 in their direction, which is clipped."""

    def __init__(self, rows: list[int], columns: int):
        super().__init__()
        torch.manual_seed(0)
        options = {"dtype": torch.bfloat16, "device": device()}
        self.weights = nn.ParameterList(torch.randn(n, columns, **options) * 0.02 for n in rows)
        self.scale = 50 / (sum(rows) * columns) ** 0.5

    def forward(self) -> torch.Tensor:
        return torch.stack([w.square().sum(dtype=torch.float32) for w in self.weights]).sum() * self.scale


def check(toy: bool, report) -> None:
    """Figures: seconds and peak memory of a step of each kind; of a checkpoint, in all, in `save` and in the next step.

    The step follows at once, without the rollout during which a run's state is read, and must not get into the file.
    """
    init_distributed()
    rows, columns = ([16, 3], 64) if toy else ([4096] * 50 + [840], 4096)
    master = {}
    for kind in ("plain", "chunked"):
        gc.collect()  # an engine and its optimizer refer to each other
        before = allocated_gib()
        engine = TrainEngine(Weights(rows, columns), EngineConfig(dtype="bf16"), "model")
        if kind == "plain":  # what utils/engine/chunked_adamw.py puts in the place of DeepSpeed's methods
            vars(engine.engine.optimizer).pop("step")
            vars(engine.engine.optimizer).pop("get_grad_norm_direct")
        steps = [step(engine) for _ in range(STEPS)][1:]  # the first one makes the moments
        seconds = statistics.median(seconds for seconds, _ in steps)
        report(**{f"{kind}_s": seconds, f"{kind}_peak_gib": steps[-1][1] - before})
        master[kind] = engine.engine.optimizer.single_partition_of_fp32_groups[0].detach().cpu()
        engine = engine if kind == "chunked" else None
    apart = float((master["plain"] - master["chunked"]).abs().max()) / LR
    report(elements=len(master["plain"]), largest_difference_in_lr=apart)
    report.expect(apart <= TOLERANCE, f"weights after {STEPS} steps are {apart:.2g} lr apart, expected {TOLERANCE}")
    master.clear()
    offload(engine, report)
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.join(folder, "checkpoints")
        writer = CheckpointWriter(folder, {"model": engine}, keep=1)
        # The first one makes the page-locked buffer that the second one finds in PyTorch's cache.
        for i, way in enumerate(("first_background", "background", "foreground"), 1):
            if toy or report.seconds_left() > 20:
                write(writer, engine, Path(folder) / f"step_{i}", way, report)
        verify(Path(folder), report)
    shutdown_distributed()


def allocated_gib() -> float:
    """On the GPU in use; 0 on a CPU."""
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_initialized() else 0.0


def step(engine: TrainEngine) -> tuple[float, float]:
    """One step: (seconds, GiB at most)."""
    engine.backward(engine())
    (_, seconds), peak = peak_of(timed, lambda: (engine.measure(), engine.apply(LR)))
    return seconds, peak


def offload(engine: TrainEngine, report) -> None:
    """Moves the optimizer's state to host memory and back, twice: the first time makes the page-locked memory."""
    state = {name: x.to("cpu", copy=True) for name, x in engine.state_tensors().items()}
    held = allocated_gib()
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            _, out = timed(stack.enter_context, engine.states_offloaded())
            freed = held - allocated_gib()
            _, back = timed(stack.close)
        report(states_out_s=out, states_back_s=back, states_freed_gib=freed)
    size = sum(x.nbytes for x in state.values()) / GIB
    report.expect(freed >= 0.99 * size or not held, f"{freed:.2f} GiB were freed, expected {size:.2f}")
    found = engine.state_tensors()
    wrong = [name for name, x in state.items() if not torch.equal(found[name].cpu(), x)]
    report.expect(not wrong, f"{len(wrong)} of {len(state)} tensors have changed in host memory")


def write(writer: CheckpointWriter, engine: TrainEngine, folder: Path, way: str, report) -> None:
    """Writes a checkpoint and makes a step: seconds of `save` and of the step, and until it is on the disk."""
    said: list[str] = []
    last, live = list(engine.state_tensors().items())[-1]  # what the thread reads last
    before = live.to("cpu", copy=True)
    number, start = {"step": int(folder.name.removeprefix("step_"))}, time.perf_counter()
    _, waited = timed(writer.save, number, said.append, way != "foreground")
    saved = time.perf_counter() - start
    report(**{f"{way}_next_step_s": step(engine)[0]})
    writer.finish()
    seconds = saved if way == "foreground" else time.perf_counter() - start
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    report(**{f"{way}_waited_s": waited, f"{way}_s": seconds, f"{way}_gb_per_s": size / seconds / 1e9})
    report.expect(size > 0, f"no checkpoint was written: {' '.join(said)}")
    with safe_open(folder / "model-rank0.safetensors", "pt") as file:
        same = torch.equal(file.get_tensor(last), before)
    report.expect(same, f"{way}: {last} is not what it was before the step")
    report.expect(not torch.equal(live.cpu(), before), f"{way}: the step after the checkpoint changed nothing")


def verify(folder: Path, report) -> None:
    """Reads the newest checkpoint and compares its hash with the manifest's."""
    for file in folder.glob("*/*.safetensors"):
        found, noted = sha256(str(file)), json.loads((file.parent / MANIFEST).read_text())[file.name]["sha256"]
        report.expect(found == noted, f"{file.name}: SHA-256 {found[:12]}, the manifest says {noted[:12]}")
