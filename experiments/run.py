"""Run the experiments and evaluate their claims:   python -m experiments.run --figure 4 --figure 9   (or all, or parts)

Builds the world (experiments/world.py), then runs all settings and seeds of the figures, one core per run, the longest
first. Finished runs are stored in outputs/experiments under a hash of setting, seed and code. After Ctrl-C, all runs
save and the same command resumes them. Results replace those in experiments/results; `experiments.report`, which is
called last, writes experiments/RESULTS.md and experiments/report.html.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.utils import logging

from experiments import report
from experiments.claims import FIGURES
from experiments.curves import Run, load_runs, read_run, save_run
from experiments.settings import ENVIRONMENT, REPOSITORY, command, load_flags, run_hash
from experiments.stages import answer_nll, answer_tokens, read_dialogues
from experiments.world import OPTIONAL, WORLD, build_world
from utils.errors import UserError
from utils.flags.parser import entry_point
from utils.tokenizer import load_tokenizer

SHOW_EVERY = 30  # seconds
KEEPING = threading.Lock()  # the runs of a setting share a file
STOPPED = 143  # exit code of train_ppo.py after it has saved on SIGTERM


@dataclass
class Job:
    """One run. code: folder of the code to run; process: its process while it runs."""

    setting: str
    seed: int
    folder: Path
    code: Path = REPOSITORY
    process: subprocess.Popen | None = None

    @property
    def total_steps(self) -> int:
        """Number of steps, with the critic's pre-training."""
        flags = load_flags(self.setting)
        return int(flags["train_steps"]) + int(flags["critic_pretrain_steps"])

    @property
    def steps(self) -> int:
        """Number of finished steps."""
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    @property
    def finished(self) -> bool:
        """Whether the final model exists."""
        return (self.folder / "final").is_dir()


def folder_name(setting: str, seed: int) -> str:
    """Returns the folder name of a run, which changes with the setting and the code."""
    return f"{setting}-{seed}-{run_hash(setting, seed)}"


def jobs_of(figures: list[str], output: Path) -> list[Job]:
    """Returns one job per setting and seed, the longest first."""
    wanted = {}
    for figure in figures:
        for setting, seeds in FIGURES[figure].settings.items():
            wanted[setting] = max(seeds, wanted.get(setting, 0))
    jobs = [
        Job(setting, seed, output / "runs" / folder_name(setting, seed))
        for setting, seeds in wanted.items() for seed in range(1, seeds + 1)
    ]  # fmt: skip
    return sorted(jobs, key=lambda job: -job.total_steps)


def execute(job: Job, world: Path) -> bool:
    """Runs a job; returns False if it was stopped before its end. Raises UserError if it fails."""
    if not job.finished:
        job.folder.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "train_ppo.py", *command(job.setting, job.seed, world, job.folder)]
        with (job.folder / "output.log").open("a") as log:
            job.process = subprocess.Popen(
                argv, cwd=job.code, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
            )
        code = job.process.wait()
        job.process = None
        if code == STOPPED:
            return False
        if code:
            raise UserError(f"{job.folder}: train_ppo.py failed with exit code {code}; see output.log there")
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    return True


def work(job: Job, world: Path, base_nll: float) -> None:
    """Runs a job and stores its results when it has finished."""
    if not execute(job, world):
        return
    tax = reply_nll(job.folder / "final", world) - base_nll
    keep(read_run(job.folder, job.setting, job.seed, run_hash(job.setting, job.seed), tax))


def keep(run: Run) -> None:
    """Stores a run's results, and prints whether they differ from the stored ones."""
    with KEEPING:
        before = next((other for other in load_runs(run.setting) if other.seed == run.seed), None)
        origin = {name: getattr(run, name) for name in ("hash", "commit", "seconds", "machine")}
        same = before and replace(before, **origin) == run
        what = "same results as before" if same else "results differ from before" if before else "new"
        print(f"{run.setting}, seed {run.seed}: {what}", flush=True)
        if not same:
            save_run(run)


def reply_nll(model: Path, world: Path) -> float:
    """Returns the NLL per token of human replies to held-out messages."""
    tokenizer = load_tokenizer(str(model))
    _, dialogues = read_dialogues(tokenizer, world / "dialogues", "moss_en")
    return float(answer_nll(model, dialogues, torch.float32).sum()) / sum(len(answer_tokens(x)) for x in dialogues)


def show_progress(jobs: list[Job], started: float, before: int) -> None:
    """Prints the progress and the remaining time at the speed since the start of this command."""
    done, total = sum(job.steps for job in jobs), sum(job.total_steps for job in jobs)
    pace = (done - before) / (time.monotonic() - started)
    left = f", {(total - done) / pace / 60:.0f} min left" if pace else ""
    running = ", ".join(f"{job.setting}-{job.seed} {job.steps}/{job.total_steps}" for job in jobs if job.process)
    finished = sum(job.finished for job in jobs)
    print(f"{finished}/{len(jobs)} runs, {done:,}/{total:,} steps, {pace:.1f}/s{left}; {running}", flush=True)


def run_all(jobs: list[Job], world: Path, workers: int) -> None:
    """Runs all jobs, `workers` at a time, and stores their results."""
    base_nll = reply_nll(world / "sft" / "final", world)
    side_by_side(jobs, lambda job: work(job, world, base_nll), workers)


def side_by_side(jobs: list[Job], work: Callable[[Job], object], workers: int) -> None:
    """Runs `work` for all jobs, `workers` at a time, and prints the progress."""
    started, before = time.monotonic(), sum(job.steps for job in jobs)
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(work, job) for job in jobs}
        try:
            while waiting:
                done, waiting = wait(waiting, SHOW_EVERY, FIRST_EXCEPTION)
                for result in done:
                    result.result()
                show_progress(jobs, started, before)
        finally:  # after a failure or Ctrl-C: running jobs save, waiting jobs do not start
            pool.shutdown(wait=False, cancel_futures=True)
            for job in jobs:
                if job.process:
                    job.process.send_signal(signal.SIGTERM)


def stop_in_order() -> None:
    """Handles SIGTERM like Ctrl-C, so that no run is left without its parent."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Runs the figures and prints their verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figure", action="append", required=True, choices=[*FIGURES, "all"], help="may be repeated")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of parallel runs, one core each")
    parser.add_argument("--output", type=Path, default=REPOSITORY / WORLD.parent)
    options = parser.parse_args(argv)
    stop_in_order()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started, figures = time.monotonic(), list(FIGURES) if "all" in options.figure else options.figure
    world = options.output / "world"
    jobs = jobs_of(figures, options.output)
    values = {str(value).split("/")[0] for job in jobs for value in load_flags(job.setting).values()}
    build_world(world, OPTIONAL & values)
    run_all(jobs, world, options.workers)
    print(f"all runs finished, {(time.monotonic() - started) / 60:.0f} min")
    report.main(figures)


if __name__ == "__main__":
    main()
