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
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.helpers.tiny_run import REPOSITORY, build_inputs, clean_environment, run_flags

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

MEMORY_GROWTH = 0.01  # of the median, from the first samples after the warm-up to the last
BOARD_GROWTH = 0.02  # of the bytes a step
FLAGS = {
    "num_rollouts": 4, "batch_size": 4, "rollout_batch_size": 4, "maxlen_prompt": 48, "maxlen_res": 8, "num_samples": 1,
    "lr": 1e-6, "critic_lr": 1e-5, "warmup_steps": 10, "save_per_step": 100, "checkpoint_per_step": 100,
    "alarm_kl": 0, "alarm_perplexity": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What a process holds after a step. memory, board: bytes."""

    step: int
    memory: int
    descriptors: int
    threads: int
    board: int


def sample(process: int, step: int, board: Path) -> Sample:
    """Reads /proc. Raises OSError when the process has ended."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    descriptors = len(os.listdir(f"/proc/{process}/fd"))
    size = sum(file.stat().st_size for file in board.glob("*"))
    return Sample(step, 1024 * int(status["VmRSS"].split()[0]), descriptors, int(status["Threads"]), size)


def watch(argv: list[str], out: Path, log: Path, every: int) -> list[Sample]:
    """Runs train_ppo.py; a sample about every so many steps. AssertionError when it does not end well."""
    samples, next_step = [], every
    with log.open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "train_ppo.py", *argv], cwd=REPOSITORY, env=clean_environment(), stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    lines, step = None, 0
    while run.poll() is None:
        time.sleep(0.05)
        if lines is None and (out / "metrics.jsonl").exists():
            lines = (out / "metrics.jsonl").open("rb")
        step += lines.read().count(b"\n") if lines else 0
        if step >= next_step:
            try:
                samples.append(sample(run.pid, step, out / "tensorboard"))
            except (OSError, KeyError):  # it has just ended
                break
            next_step = step - step % every + every
    assert run.wait() == 0, f"exit code {run.returncode}: see {log}\n{log.read_text()[-3000:]}"
    return samples


def problems(samples: list[Sample], steps: int) -> list[str]:
    """What has grown between the first sixth of the run and its end."""
    settled = [s for s in samples if s.step >= steps / 6]
    share = max(1, len(settled) // 10)
    first, last = settled[:share], settled[-share:]
    growth = median(s.memory for s in last) / median(s.memory for s in first) - 1
    found = [f"resident memory grew by {growth:.2%}"] if growth >= MEMORY_GROWTH else []
    for name in ("descriptors", "threads"):
        before, after = (int(median(getattr(s, name) for s in part)) for part in (first, last))
        found += [f"{name} grew from {before} to {after}"] if after > before else []
    middle = settled[len(settled) // 2]
    early, late = board_rate(settled[0], middle), board_rate(middle, settled[-1])
    found += [f"TensorBoard: {early:.0f} bytes a step, then {late:.0f}"] if late > early * (1 + BOARD_GROWTH) else []
    print(f"resident memory over the last {settled[-1].step - settled[0].step} steps: {growth:+.2%}; "
          f"TensorBoard: {early:.0f} bytes a step, then {late:.0f}")  # fmt: skip
    return found


def board_rate(start: Sample, end: Sample) -> float:
    """Bytes a step that went to TensorBoard between two samples."""
    return (end.board - start.board) / (end.step - start.step)


def table(samples: list[Sample], rows: int = 13) -> str:
    """Some of the samples, evenly spread, the last one among them."""
    chosen = {round(i * (len(samples) - 1) / (rows - 1)) for i in range(rows)}
    lines = ["| step | resident memory, MB | descriptors | threads | TensorBoard, MB |", "|---|---|---|---|---|"]
    for s in (samples[i] for i in sorted(chosen)):
        lines.append(f"| {s.step} | {s.memory / 1e6:.2f} | {s.descriptors} | {s.threads} | {s.board / 1e6:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Prints a table; exit code 1 when something grows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs, out = build_inputs(Path(folder)), Path(folder) / "run"
        started = time.perf_counter()
        argv = run_flags(inputs, out, **FLAGS | {"train_steps": options.steps})
        samples = watch(argv, out, Path(folder) / "log", max(1, options.steps // 300))
    print(table(samples))
    print(f"{options.steps} steps in {time.perf_counter() - started:.0f} s")
    found = problems(samples, options.steps)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
