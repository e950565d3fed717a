"""Thousands of steps of a tiny run, watched from its reward function:   python -m tests.faults.soak --steps 3000

With evaluations and checkpoints on the way, resident memory, file descriptors, threads and the bytes of the TensorBoard
file have to stay flat: after the first sixth, memory may grow by less than 1 %, descriptors and threads not at all, and
a step may not write more than it did before.
"""

import argparse
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

from tests.helpers.tiny_run import Inputs, build_inputs, run_flags, run_module

MEMORY_GROWTH = 0.01  # of the median, from the first samples after the warm-up to the last
BOARD_GROWTH = 0.02  # of the bytes per step
FLAGS = {
    "num_rollouts": 4, "batch_size": 4, "rollout_batch_size": 4, "maxlen_prompt": 48, "maxlen_res": 8, "num_samples": 1,
    "lr": 1e-6, "critic_lr": 1e-5, "warmup_steps": 10, "save_per_step": 100, "checkpoint_per_step": 100,
    "alarm_kl": 0, "alarm_perplexity": 0,
}  # fmt: skip


def watched(prompts, answers) -> list[float]:
    """A reward function: a line of memory in KB, descriptors, threads and bytes goes to the file that SOAK names."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    board = sum(file.stat().st_size for file in Path(os.environ["SOAK"]).with_name("run").glob("tensorboard/*"))
    numbers = status["VmRSS"].split()[0], len(os.listdir("/proc/self/fd")), int(status["Threads"]), board
    with open(os.environ["SOAK"], "a") as file:
        print(*numbers, file=file)
    return [answer.count("e") / 8 for answer in answers]


def watch(inputs: Inputs, folder: Path, steps: int) -> list[tuple[int, ...]]:
    """(memory, descriptors, threads, bytes) at each call of the reward function. AssertionError when a run fails."""
    argv = run_flags(inputs, folder / "run", **FLAGS | {"train_steps": steps, "reward_fn": f"{__file__}:watched"})
    result = run_module("train_ppo", *argv, timeout=36000, SOAK=str(folder / "samples"))
    assert result.returncode == 0, result.stderr[-3000:]
    return [tuple(map(int, line.split())) for line in (folder / "samples").read_text().splitlines()]


def problems(samples: list[tuple[int, ...]]) -> list[str]:
    """What has grown between the first sixth of the run and its end."""
    settled = samples[len(samples) // 6 :]
    share = max(1, len(settled) // 10)
    first, last = ([median(column) for column in zip(*part)] for part in (settled[:share], settled[-share:]))
    growth = last[0] / first[0] - 1
    found = [f"resident memory grew by {growth:.2%}"] if growth >= MEMORY_GROWTH else []
    names = zip(("descriptors", "threads"), first[1:], last[1:], strict=False)
    found += [f"{name} grew from {before:.0f} to {after:.0f}" for name, before, after in names if after > before]
    half = len(settled) // 2
    early, late = ((b[3] - a[3]) / half for a, b in pairwise((settled[0], settled[half], settled[2 * half - 1])))
    return found + ([f"TensorBoard: {early:.0f} bytes, then {late:.0f}"] if late > early * (1 + BOARD_GROWTH) else [])


def main() -> int:
    """Prints samples and what has grown; exit code 1 when something has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        samples = watch(build_inputs(Path(folder)), Path(folder), steps)
    found = problems(samples)
    print("KB, descriptors, threads, bytes:", samples[len(samples) // 6], samples[-1], *found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
