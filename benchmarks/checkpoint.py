"""What a checkpoint in the background costs:   python benchmarks/checkpoint.py [--model 0.3B] [--stages 2 3]

Two ranks train a random LLaMA. A step is --forwards forwards without gradient over --tokens random tokens per rank, as
rollout and scoring leave the weights alone, then forward, backward and optimizer step. After --checkpoints steps a
checkpoint is written during every second step. Prints medians of both kinds of steps (seconds, and of one rank's CPU),
the seconds for which the optimizer step waited, and the memory of a process that belongs to no file (RssAnon) at its
highest: the page cache is not counted.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.environment import MALLOC, add_dtype

ROW = 512  # tokens
MODELS = {
    "58M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376},
    "0.3B": {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 2816},
    "1.1B": {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "intermediate_size": 5632,
             "num_key_value_heads": 4},
}  # fmt: skip


class PeakMemory(threading.Thread):
    """Context that notes the highest memory of this process while it lasts, every 20 ms: `mb`."""

    def __enter__(self):
        self.mb, self._ended = 0.0, threading.Event()
        self.start()
        return self

    def run(self) -> None:
        """Looks until the context ends."""
        while True:
            self.mb = max(self.mb, int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
            if self._ended.wait(0.02):
                return

    def __exit__(self, *_) -> None:
        self._ended.set()
        self.join()


def run_rank(options: argparse.Namespace) -> None:
    """Measures with one ZeRO stage; the first rank prints."""
    import torch

    from benchmarks.random_inputs import random_lm
    from benchmarks.timing import timed
    from ppo.models import PolicyModel
    from utils.distributed import gather_objects, is_main, rank, world_size
    from utils.engine.engine import DTYPES, TrainEngine, device, init_distributed, shutdown_distributed
    from utils.flags.engine import EngineConfig
    from utils.models.load import enable_checkpointing
    from utils.run.checkpoint import CheckpointWriter

    init_distributed()
    lm = random_lm(MODELS[options.model], DTYPES[options.dtype], device())
    enable_checkpointing(lm)
    parameters = sum(p.numel() for p in lm.parameters())
    engine = TrainEngine(PolicyModel(lm), EngineConfig(dtype=options.dtype, zero_stage=options.stages[0]), "policy")
    rows = torch.randint(3, 32000, (options.tokens // ROW, ROW), generator=torch.Generator().manual_seed(rank()))
    rows, said = rows.to(device()), []

    def step() -> None:
        with torch.no_grad():
            for row in options.forwards * list(rows):
                engine(row[None], row[None] > 0, 1.0)
        for row in rows:
            engine.backward(-engine(row[None], row[None] > 0, 1.0)[0].sum() / options.tokens / world_size())
        engine.measure()
        engine.apply(1e-6)

    step()  # makes the moments
    seconds, cpu, waits, peaks = {False: [], True: []}, {False: [], True: []}, [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        folder = gather_objects(folder)[0]
        writer = CheckpointWriter(os.path.join(folder, "checkpoints"), {"policy": engine}, keep=1)
        for number in range(3 * options.checkpoints):
            writes = number > options.checkpoints and (number - options.checkpoints) % 2 == 1
            started = time.process_time()
            with PeakMemory() as peak:
                if writes:
                    writer.save({"step": number}, said.append, background=True)
                seconds[writes].append(timed(step)[1])
                if writes:
                    waits.append(max(gather_objects(writer._writing.waited)))
                writer.finish()
            cpu[writes].append(time.process_time() - started)
            peaks.append(max(gather_objects(peak.mb)))
    if is_main():
        (alone, usual), (beside, slow) = (spread(seconds[writes]) for writes in (False, True))
        print(
            f"ZeRO-{options.stages[0]}, {parameters / 1e6:.0f}M parameters, {options.dtype}, {world_size()} ranks, "
            f"{options.tokens} tokens per rank",
            f"step {usual}, while a checkpoint is written {slow}: {beside / alone - 1:+.1%}; of that, the run waited "
            f"{statistics.median(waits):.2f} s",
            f"CPU of rank 0: {spread(cpu[False])[1]}, while a checkpoint is written {spread(cpu[True])[1]}",
            f"memory of a rank in each step, MB: {', '.join(f'{peak:.0f}' for peak in peaks)}",
            *said, sep="\n", flush=True,
        )  # fmt: skip
    shutdown_distributed()


def spread(seconds: list[float]) -> tuple[float, str]:
    """Returns the median, and it as text with the range."""
    median = statistics.median(seconds)
    return median, f"{median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    """Starts two ranks for each ZeRO stage; in a rank, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="0.3B")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="ZeRO stages")
    parser.add_argument("--tokens", type=int, default=2048, help="per rank and step, in rows of 512")
    parser.add_argument("--forwards", type=int, default=2, help="without gradient; 0: as in supervised training")
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    add_dtype(parser)
    options = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(options)
        return
    for stage in options.stages:
        command = [sys.executable, "-m", "utils.launcher", "2", __file__, *sys.argv[1:], "--stages", str(stage)]
        subprocess.run(command, env=os.environ | MALLOC, cwd=Path(__file__).parents[1], check=True)


if __name__ == "__main__":
    main()
