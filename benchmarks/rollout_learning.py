"""Compare what PPO learns by rollout engine:   python benchmarks/rollout_learning.py --world FOLDER (or --demo FOLDER)

Runs train_ppo.py once per arm and seed, on one thread each, and prints the mean score of the last five steps and that
of held-out prompts after the last one: means over seeds with 95 % intervals (Student's t), and each arm minus the
first, seed by seed. Arms: own; vllm; truncate, mask_token or mask_sequence, which are vllm with this
--sampler_correction.

--world: folder made by `python -m experiments.world`: a policy of 1.1M parameters, and its proxy reward as the score.
--demo: folder made by `python -m data.demo.english`: the model of 135M, and VADER's lexicon as the score.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.intervals import over_seeds
from experiments.settings import ENVIRONMENT, PATHS, REPOSITORY
from utils.errors import UserError
from utils.flags.parser import entry_point

LAST = 5  # steps whose scores are averaged
COMMON = {
    "zero_stage": 1, "critic_pretrain_steps": 2, "warmup_steps": 2, "lr_schedule": "constant", "reward_clip": 2.0,
    "micro_batch_tokens": 2048, "checkpoint_per_step": 1000,
}  # fmt: skip
WORLD = COMMON | {
    "lr": 3e-4, "critic_lr": 1e-3, "num_rollouts": 64, "batch_size": 16, "rollout_batch_size": 64, "maxlen_prompt": 36,
    "maxlen_res": 16, "num_eval_prompts": 256,
}  # fmt: skip
DEMO = COMMON | {
    "policy_model_path": "model", "critic_model_path": "reward_base", "data_path": "prompts", "lr": 6e-5,
    "critic_lr": 2e-4, "kl_penalty_weight": 0.1, "missing_eos_penalty": 1.0, "temperature": 0.8, "num_rollouts": 16,
    "batch_size": 8, "rollout_batch_size": 16, "maxlen_prompt": 84, "maxlen_res": 32, "num_eval_prompts": 64,
    "reward_fn": "data/demo/annotators.py:vader",
}  # fmt: skip
ENGINES = {"own": {"rollout_engine": "own"}, "vllm": {"rollout_engine": "vllm"}}
ARMS = ENGINES | {
    kind: ENGINES["vllm"] | {"sampler_correction": kind} for kind in ("truncate", "mask_token", "mask_sequence")
}


def flags_of(options: argparse.Namespace, arm: str, seed: int, out: Path) -> list[str]:
    """Returns the command line of a run."""
    folder, flags = (options.world, WORLD | PATHS) if options.world else (options.demo, DEMO)
    flags = (
        flags | {name: folder.resolve() / value for name, value in flags.items() if name.endswith("_path")} | ARMS[arm]
    )
    steps = {"train_steps": options.steps, "save_per_step": options.steps + COMMON["critic_pretrain_steps"]}
    flags |= steps | {"dtype": options.dtype, "seed": seed, "model_save_path": out}
    return as_argv(flags)


def as_argv(flags: dict[str, object]) -> list[str]:
    """Returns flags as words of a command line."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def scores_of(argv: list[str], out: Path) -> dict[str, float]:
    """Runs train_ppo.py; returns the scores and, where vLLM sampled, the largest KL between it and the policy."""
    command = [sys.executable, "train_ppo.py", *argv]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-2000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    kl = {"sampler_kl": max(row["sampler_kl"] for row in rows)} if "sampler_kl" in rows[0] else {}
    shutil.rmtree(out)
    last = fmean(row["score_mean"] for row in rows[-LAST:])
    found = {"first": rows[0]["score_mean"], "last": last, "held out": rows[-1]["eval_score_mean"]} | kl
    print(out.name, *(f"{name} {value:.6g}" for name, value in found.items()), sep=", ", flush=True)
    return found


def interval(values: list[float]) -> str:
    """Returns mean and 95 % interval over seeds."""
    mean, half = over_seeds(values)
    return f"{mean:.3f} ± {half:.3f}"


def report(found: dict[str, list[dict[str, float]]]) -> None:
    """Prints one line per arm. found: arm -> scores by seed."""
    base = next(iter(found.values()))
    for arm, runs in found.items():
        print(f"{arm:13}", end="")
        for name in ("first", "last", "held out"):
            print(f"  {name} {interval([run[name] for run in runs])}", end="")
        if runs is not base:
            print(
                f"  difference {interval([a['last'] - b['last'] for a, b in zip(runs, base, strict=True)])}", end=", "
            )
            print(interval([a["held out"] - b["held out"] for a, b in zip(runs, base, strict=True)]), end="")
        if "sampler_kl" in runs[0]:
            print(f"  sampler_kl up to {max(run['sampler_kl'] for run in runs):.1e}", end="")
        print(flush=True)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Runs all arms and seeds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--world", type=Path)
    where.add_argument("--demo", type=Path)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ENGINES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.workers) as pool:
        jobs = {}
        for seed in range(1, options.seeds + 1):
            for arm in options.arms:
                out = Path(folder) / f"{arm}-{seed}"
                jobs[arm, seed] = pool.submit(scores_of, flags_of(options, arm, seed, out), out)
        found = {arm: [jobs[arm, seed].result() for seed in range(1, options.seeds + 1)] for arm in options.arms}
    report(found)


if __name__ == "__main__":
    main()
