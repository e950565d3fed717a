"""Tiny runs of train_ppo.py, in this process or as commands, and how far their metrics are apart."""

import contextlib
import subprocess
import sys
from pathlib import Path

from ppo.build import build
from ppo.config import AMOUNTS, PRESETS, PPOConfig
from tests.gpu.report import Report
from tests.helpers.tiny_run import REPOSITORY, clean_environment, read_metrics, run_flags
from train_ppo import loop, main
from utils.flags.parser import parse_args

# All losses; the critic alone in the first of three steps.
FLAGS = {
    "critic_pretrain_steps": 1, "train_steps": 2, "maxlen_res": 16, "micro_batch_tokens": 120, "num_eval_prompts": 0,
    "use_entropy_loss": True, "entropy_loss_weight": 0.1, "entropy_clip": 5, "use_ppo_pretrain_loss": True,
    "ppo_pretrain_loss_weight": 0.5, "ppo_pretrain_batch_size": 6, "missing_eos_penalty": 0.5, "checkpoint_per_step": 0,
}  # fmt: skip
TOLERANCE = 1e-4  # of metrics in float32, relative
FLOOR = 0.1  # differences of smaller numbers count as shares of this one


def flags_of(inputs, out: Path, **changes) -> list[str]:
    """A command line of train_ppo.py with `FLAGS`."""
    return run_flags(inputs, out, **{"ppo_pretrain_data_path": inputs.dialogues} | FLAGS | changes)


def run(flags: list[str]) -> int:
    """Runs train_ppo.py in this process, on the device that the engine chooses; returns its exit code."""
    try:
        main(flags)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def train(flags: list[str], prepare=lambda run: None) -> None:
    """Runs train_ppo.py's loop in the process group that this process has joined. prepare: is called with the run."""
    run = build(parse_args(PPOConfig, flags, PRESETS, AMOUNTS))
    prepare(run)
    with contextlib.closing(run.logger), run.keeper:
        loop(run)


def start(flags: list[str], log: Path, on_cpu: bool = False) -> subprocess.Popen:
    """Starts `python train_ppo.py` as a user does. on_cpu: with the GPU hidden."""
    environment = clean_environment()
    if on_cpu:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "train_ppo.py", *flags], cwd=REPOSITORY, env=environment, stdout=output, stderr=output
        )


def wait_for(process: subprocess.Popen, log: Path, seconds: float) -> int:
    """Returns the exit code; prints the end of the log where it is not 0."""
    code = process.wait(seconds)
    if code:
        print(log.read_text("utf-8", "replace")[-5000:])
    return code


def expect_close(out: Path, expected: Path, report: Report) -> None:
    """Reports the largest relative difference of two runs' metrics, under the run's name, and which metric it is."""
    rows, others = read_metrics(out), read_metrics(expected)
    far, worst = float("inf"), "which metrics there are"
    if rows and [row.keys() for row in rows] == [row.keys() for row in others]:
        far, worst = max(
            (abs(row[key] - other[key]) / max(abs(other[key]), FLOOR), f"{key} of step {row['step']}")
            for row, other in zip(rows, others, strict=True)
            for key in row
        )
    report(**{out.name: far, f"{out.name}_worst": worst})
    report.expect(far <= TOLERANCE, f"{out.name}: {worst} is off by {far:.1e}, limit {TOLERANCE}")
