"""Compare rollouts of vLLM with this toolkit's own decoding:   python benchmarks/rollout_engines.py [--dtype bf16 fp32]

Both sample from the same policy, the demo's model of 135M parameters, for the same chat prompts with the same seeds, at
temperature 0.8 as in the demo, in one process per dtype, in turn. Prints

1. tokens per second in buffers of 8, 64 and 256 responses of at most 64 tokens: medians over pairs of calls, and their
   ratio (smallest - largest), also with vLLM's copy and comparison of the weights; and the share of the toolkit's draw
   of tokens in vLLM's sampling
2. seconds of PPO steps of the demo's sizes by stage, of which each rollout is done with both engines; the share of copy
   and comparison in the step with vLLM; and the ratio of the two steps.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.environment import MALLOC
from benchmarks.rollout_learning import DEMO, as_argv
from benchmarks.timing import timed
from ppo.build import build
from ppo.config import PPOConfig
from ppo.decoding.sampling import Sampling
from ppo.decoding.vllm_draw import Draw
from ppo.rollout import PolicySampler
from ppo.run import Run
from ppo.types import PromptBatch, SampledRollout
from reward.model import load_scalar_model, save_scalar_model
from train_ppo import loop
from utils.flags.parser import entry_point, parse_args

SIZES = {"num_rollouts": 32, "batch_size": 16, "rollout_batch_size": 256, "maxlen_prompt": 116, "maxlen_res": 64}
PARTS = ("load", "first_difference", "generate", "apply")  # copy, comparison, sampling, draw


@dataclass
class Pairs:
    """A `Sampler` that samples with both engines, in alternating order, and returns vLLM's rollout.

    clock: seconds by PARTS so far; calls: seconds and "... tokens" of the responses by engine, and seconds by PARTS.
    """

    samplers: dict[str, Callable]
    clock: Counter
    calls: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, prompts: PromptBatch, sampling: Sampling, seed: int) -> SampledRollout:
        before, call, rollouts = Counter(self.clock), {}, {}
        for name in sorted(self.samplers, reverse=len(self.calls) % 2 == 1):
            rollouts[name], call[name] = timed(self.samplers[name], prompts, sampling, seed)
            call[f"{name} tokens"] = int(rollouts[name].response_mask.sum())
        self.calls.append(call | {name: self.clock[name] - before[name] for name in PARTS})
        return rollouts["vllm"]

    def explain(self) -> str | None:
        """As vLLM's sampler does."""
        return self.samplers["vllm"].explain()


def measured(owner, name: str, clock: Counter) -> None:
    """Replaces a function of a class or an object by one that adds its seconds to `clock`."""
    function = getattr(owner, name)

    def call(*args, **kwargs):
        result, seconds = timed(function, *args, **kwargs)
        clock[name] += seconds
        return result

    setattr(owner, name, call)


def start(options: argparse.Namespace, dtype: str, out: Path) -> tuple[Run, Counter]:
    """Returns a run of train_ppo.py with vLLM, and the seconds by function of what vLLM does in it."""
    reward, base = out / "reward", str(options.demo / "reward_base")
    # A random head costs as much as a trained one.
    save_scalar_model(load_scalar_model(base, torch.bfloat16, torch.device("cpu"), say=str), str(reward))
    paths = {"policy_model_path": options.demo / "model", "critic_model_path": reward, "reward_model_path": reward}
    flags = DEMO | SIZES | paths | {"data_path": options.demo / "prompts", "model_save_path": out / "run"}
    flags |= {"num_eval_prompts": 0, "critic_pretrain_steps": 0, "warmup_steps": 0, "train_steps": options.steps + 1}
    flags |= {"dtype": dtype, "rollout_engine": "vllm"}
    del flags["reward_fn"]
    run, clock = build(parse_args(PPOConfig, as_argv(flags))), Counter()
    for name in PARTS:
        measured(Draw if name == "apply" else run.sampler.engine, name, clock)
    return run, clock


def pairs_of(run: Run, clock: Counter, batch: int) -> Pairs:
    """Returns the two samplers of the run's policy. batch: sequences that the own one decodes at once."""
    config = replace(run.config, rollout_batch_size=batch)
    return Pairs({"own": PolicySampler(run.models.policy, run.tokenizer, config), "vllm": run.sampler}, clock)


def rates(run: Run, clock: Counter, batch: int, seconds: float) -> None:
    """Prints the first table's line of a batch size: pairs of calls for at least `seconds`, after a warm-up."""

    def prompts(first: int, count: int) -> PromptBatch:
        places = list(range(first, first + count))
        ids = [prompt.ids for prompt in run.prompts.first(first + count)[first:]]
        return PromptBatch(ids, [[]] * count, places)

    pairs_of(run, clock, batch)(prompts(0, min(batch, 8)), run.sampling, 0)
    pairs, begin = pairs_of(run, clock, batch), time.perf_counter()
    while len(pairs.calls) < 2 or time.perf_counter() - begin < seconds:
        pairs(prompts(len(pairs.calls) * batch % (len(run.prompts) - batch), batch), run.sampling, 0)
    own, whole = ([call[f"{name} tokens"] / call[name] for call in pairs.calls] for name in ("own", "vllm"))
    alone = [call["vllm tokens"] / call["generate"] for call in pairs.calls]
    draw = median(call["apply"] / call["generate"] for call in pairs.calls)
    print(
        f"batch {batch:3}: own {median(own):4.0f} tokens/s, vLLM {median(alone):4.0f}: {spread(alone, own)} x; with "
        f"copy and comparison {spread(whole, own)} x; draw {draw:.1%} of vLLM's time; {len(own)} pairs, "
        f"{sum(call['vllm tokens'] for call in pairs.calls)} tokens", flush=True,
    )  # fmt: skip


def steps(run: Run, clock: Counter) -> None:
    """Prints the second table, without the first step."""
    pairs = pairs_of(run, clock, run.config.num_rollouts)
    with contextlib.closing(run.logger), run.lifecycle:
        loop(replace(run, sampler=pairs))
    lines = (Path(run.config.model_save_path) / "metrics.jsonl").read_text("utf-8").splitlines()
    rest = [row["seconds_score"] + row["seconds_update"] for row in map(json.loads, lines)][1:]
    calls = pairs.calls[1:]
    own, vllm = ([call[name] + s for call, s in zip(calls, rest, strict=True)] for name in ("own", "vllm"))
    copy, comparison = (median(call[x] / s for call, s in zip(calls, vllm, strict=True)) for x in PARTS[:2])
    print(
        f"step of {run.config.num_rollouts} responses: rollout own {median(x['own'] for x in calls):.2f} s, vLLM "
        f"{median(x['vllm'] for x in calls):.2f} s; score and update {median(rest):.2f} s; copy {copy:.1%}, comparison "
        f"{comparison:.1%} of the step with vLLM; this step is {spread(own, vllm)} x as fast; {len(rest)} steps",
        flush=True,
    )  # fmt: skip


def spread(above: list[float], below: list[float]) -> str:
    """Returns the median ratio of pairs, the smallest and the largest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


def measure(options: argparse.Namespace, dtype: str) -> None:
    """Prints both tables of a dtype."""
    with tempfile.TemporaryDirectory() as folder:
        run, clock = start(options, dtype, Path(folder))
        print(f"{dtype}, {torch.get_num_threads()} threads", flush=True)
        for batch in options.batch:
            rates(run, clock, batch, options.seconds)
        steps(run, clock)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Measures each dtype in a process of its own, as vLLM cannot start twice in one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path(".demo/en"), help="made by python -m data.demo.english")
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each batch size, at least two pairs")
    parser.add_argument("--steps", type=int, default=2, help="after the first, which is not counted")
    options = parser.parse_args(argv)
    os.environ.update(MALLOC)  # for the processes below
    for dtype in options.dtype:
        process = get_context("spawn").Process(target=measure, args=(options, dtype))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
