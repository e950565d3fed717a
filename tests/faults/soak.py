"""Thousands of steps of a tiny run, watched from outside:   python -m tests.faults.soak --steps 3000

The real train_ppo.py in a process of its own, with evaluations and checkpoints on the way. Its resident memory, file
descriptors, threads and the bytes of its TensorBoard file have to stay flat: after the first sixth, memory may grow by
less than 1 %, descriptors and threads not at all, and a step may not write more than it did before.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.helpers.tiny_run import REPOSITORY, build_inputs, clean_environment, run_flags

MEMORY_GROWTH = 0.01  # of the median, from the first samples after the warm-up to the last
BOARD_GROWTH = 0.02  # of the bytes per step
FLAGS = {
    "num_rollouts": 4, "batch_size": 4, "rollout_batch_size": 4, "maxlen_prompt": 48, "maxlen_res": 8, "num_samples": 1,
    "lr": 1e-6, "critic_lr": 1e-5, "warmup_steps": 10, "save_per_step": 100, "checkpoint_per_step": 100,
    "alarm_kl": 0, "alarm_perplexity": 0,
}  # fmt: skip


class Sample(NamedTuple):
    """What a process holds after a step. memory, board: bytes."""

    step: int
    memory: int
    descriptors: int
    threads: int
    board: int


def watch(argv: list[str], out: Path, log: Path, every: int) -> list[Sample]:
    """Runs train_ppo.py; a sample about every so many steps. AssertionError when it does not end well."""
    samples, environment = [], clean_environment() | {"DS_ACCELERATOR": "cpu"}
    with log.open("w") as output:
        command = [sys.executable, "train_ppo.py", *argv]
        run = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT)
    metrics, process = out / "metrics.jsonl", Path(f"/proc/{run.pid}")
    while run.poll() is None:
        time.sleep(0.05)
        step = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if step < every or (samples and step < samples[-1].step + every):
            continue
        try:
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            board = sum(file.stat().st_size for file in (out / "tensorboard").glob("*"))
            numbers = 1024 * int(status["VmRSS"].split()[0]), len(os.listdir(process / "fd")), int(status["Threads"])
            samples.append(Sample(step, *numbers, board))
        except (OSError, KeyError):  # it has just ended
            break
    assert run.wait() == 0, f"exit code {run.returncode}: {log.read_text()[-3000:]}"
    return samples


def problems(samples: list[Sample], steps: int) -> list[str]:
    """What has grown between the first sixth of the run and its end."""
    settled = [s for s in samples if s.step >= steps / 6]
    share = max(1, len(settled) // 10)
    first, last = (Sample(*map(median, zip(*part, strict=True))) for part in (settled[:share], settled[-share:]))
    found = [f"resident memory grew by {x:.2%}"] if (x := last.memory / first.memory - 1) >= MEMORY_GROWTH else []
    for name in ("descriptors", "threads"):
        before, after = int(getattr(first, name)), int(getattr(last, name))
        found += [f"{name} grew from {before} to {after}"] if after > before else []
    ends = settled[0], settled[len(settled) // 2], settled[-1]
    early, late = ((b.board - a.board) / (b.step - a.step) for a, b in pairwise(ends))
    found += [f"TensorBoard: {early:.0f} bytes per step, then {late:.0f}"] if late > early * (1 + BOARD_GROWTH) else []
    return found


def main() -> int:
    """Prints the last sample and what has grown; exit code 1 when something has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        inputs, out = build_inputs(Path(folder)), Path(folder) / "run"
        argv = run_flags(inputs, out, **FLAGS | {"train_steps": steps})
        samples = watch(argv, out, Path(folder) / "log", max(1, steps // 300))
    found = problems(samples, steps)
    print(samples[len(samples) // 6], samples[-1], *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
