"""An optimizer step of 842M elements, in chunks, and a checkpoint of its 10 GB of state.

842M are an eighth of 7B: what each of eight ranks holds.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.timing import GIB, peak_of, timed
from utils.engine.engine import TrainEngine, device, init_distributed, shutdown_distributed
from utils.flags.engine import EngineConfig
from utils.run.checkpoint import CheckpointWriter
from utils.run.restore import named

STEPS, LR = 4, 1e-3


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
    """Figures: seconds and peak memory of a step; seconds that a checkpoint takes, and that the run waits for it."""
    init_distributed()
    rows, columns = ([16, 3], 64) if toy else ([4096] * 50 + [840], 4096)
    before = torch.cuda.memory_allocated() / GIB if torch.cuda.is_initialized() else 0.0
    engine, steps = TrainEngine(Weights(rows, columns), EngineConfig(), "model"), []
    master = engine.engine.optimizer.single_partition_of_fp32_groups[0]
    start = master.detach().cpu().clone()
    for _ in range(STEPS):
        engine.backward(engine())
        steps.append(peak_of(timed, engine.step, LR))
    seconds = statistics.median(seconds for (_, seconds), _ in steps[1:])  # the first one makes the moments
    moved = float((master.detach().cpu() - start).abs().mean()) / LR / STEPS
    report(elements=len(start), chunked_s=seconds, chunked_peak_gib=steps[-1][1] - before, moved_in_lr=moved)
    report.expect(0.7 < moved < 1.1, f"weights moved by {moved:.3g} lr per step, expected 1: gradients keep their sign")
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(folder, {"model": engine}, keep=1)
        # The first one makes the copies in page-locked memory that the second one finds there.
        for i, way in enumerate(("first_background", "background", "foreground"), 1):
            if toy or report.seconds_left() > 20:
                write(writer, Path(folder) / f"step_{i}", way, report)
                last = f"{folder}/step_{i}"
        named(last)  # raises UserError where hashes are not those of the manifest
    shutdown_distributed()


def write(writer: CheckpointWriter, folder: Path, way: str, report) -> None:
    """Writes a checkpoint: seconds that a run waits for it, and until it is on the disk."""
    said: list[str] = []
    step, start = {"step": int(folder.name.removeprefix("step_"))}, time.perf_counter()
    _, waited = timed(writer.save, step, said.append, way != "foreground")
    writer.settle()
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    report(**{f"{way}_waited_s": waited, f"{way}_s": seconds, f"{way}_gb_per_s": size / seconds / 1e9})
    report.expect(size > 0, f"no checkpoint was written: {' '.join(said)}")
