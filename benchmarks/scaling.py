"""Measure the growth of time and memory of a PPO step:   python benchmarks/scaling.py [--series responses samples …]

Each point is a step of benchmarks/ppo_step.py (8 samples of 32 to 448 prompt tokens, repeated for more samples; 64
response tokens, a 58M LLaMA, ZeRO-2, bf16 by default) with one setting changed, in its own process with its own peak
memory. `processes` compares one process with all threads with two ranks (DeepSpeed over gloo) that share them. Seconds
are medians of --steps steps after a warm-up step. An exponent is the slope of a line through the points in a log-log
plot: 1 is proportional.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.environment import MALLOC, add_dtype

MODELS = {  # million parameters -> sizes of a LLaMA with 32,000 tokens
    20: {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688},
    58: {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376},
    134: {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2064},
}
USUAL = {"response": 64, "samples": 8, "model": 58, "processes": 1}
SERIES = {  # name -> (changed setting, its values, other settings)
    "responses": ("response", [64, 128, 256, 512], {}),
    "samples": ("samples", [8, 16, 32], {}),
    "models": ("model", list(MODELS), {}),
    "processes": ("processes", [1, 2], {"samples": 16}),
}
STAGES = ("rollout", "score", "update")


def run_point(point: dict, steps: int) -> None:
    """Measures one point in this process, which can be one of several ranks; the first rank prints JSON."""
    from benchmarks.ppo_step import build, prompt_batch, timed_step
    from benchmarks.timing import peak
    from data.prompts import Prompt
    from ppo.config import PPOConfig
    from ppo.ranks import own_share
    from utils.distributed import gather_objects, is_main
    from utils.engine.engine import init_distributed, shutdown_distributed
    from utils.moments import RunningMoments

    config = PPOConfig(
        policy_model_path="-", critic_model_path="-", data_path="-", num_rollouts=point["samples"],
        batch_size=point["samples"], maxlen_prompt=448 + point["response"], maxlen_res=point["response"],
        rollout_batch_size=32, micro_batch_tokens=2048, dtype=point["dtype"],
    )  # fmt: skip
    init_distributed()
    ids = prompt_batch().ids * (point["samples"] // 8)
    prompts = own_share([Prompt(row, [], "") for row in ids], list(range(len(ids))))
    models, moments = build(config, MODELS[point["model"]]), RunningMoments()
    taken = [timed_step(models, prompts, moments, step, config)[1] for step in range(steps + 1)][1:]
    peaks = gather_objects(peak())
    if is_main():
        medians = {stage: statistics.median(step[stage] for step in taken) for stage in STAGES}
        print(json.dumps(medians | {"peak": max(peaks)}))
    shutdown_distributed()


def measure(point: dict, steps: int, threads: int) -> dict[str, float]:
    """Runs a point in new processes; returns the seconds per stage and the largest peak memory in GiB."""
    processes = point["processes"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, "--steps", str(steps), "--point", json.dumps(point)]
    environment = os.environ | MALLOC | {"OMP_NUM_THREADS": str(threads // processes)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the point {point} failed; see the messages above")
    return json.loads(done.stdout.splitlines()[-1])


def exponent(x: list[float], y: list[float]) -> float:
    """Returns the least-squares slope of log y over log x."""
    log_x, log_y = ([math.log(value) for value in values] for values in (x, y))
    return statistics.linear_regression(log_x, log_y).slope


def run_series(name: str, steps: int, threads: int, dtype: str) -> None:
    """Prints the table of a series and its exponents."""
    what, values, others = SERIES[name]
    print(f"\n{what:>10}" + "".join(f"{stage:>10}" for stage in STAGES) + f"{'seconds':>10}{'GiB':>8}{'samples/s':>11}")
    totals, peaks, rates = [], [], []
    for value in values:
        point = USUAL | others | {what: value, "dtype": dtype}
        found = measure(point, steps, threads)
        totals.append(sum(found[stage] for stage in STAGES))
        peaks.append(found["peak"])
        rates.append(point["samples"] / totals[-1])
        stages = "".join(f"{found[stage]:10.2f}" for stage in STAGES)
        print(f"{value:10}{stages}{totals[-1]:10.2f}{peaks[-1]:8.2f}{rates[-1]:11.3f}", flush=True)
    if name == "processes":
        print(f"speed of two processes relative to one with the same threads: {rates[1] / rates[0]:.2f} (target: 0.8)")
    else:
        target = " (target: at most 1.1)" if name == "samples" else ""
        print(f"exponents: seconds {exponent(values, totals):.2f}{target}, memory {exponent(values, peaks):.2f}")


def main() -> None:
    """Runs all series, or one point in a process started by `measure`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--series", nargs="+", choices=list(SERIES), default=list(SERIES))
    parser.add_argument("--steps", type=int, default=2, help="measured steps per point")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of all processes together")
    add_dtype(parser)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        run_point(options.point, options.steps)
        return
    for name in options.series:
        run_series(name, options.steps, options.threads, options.dtype)


if __name__ == "__main__":
    main()
