"""Compare rollouts of vLLM with this toolkit's own decoding:   python benchmarks/rollout_engines.py [--dtype bf16 fp32]

Both sample from the same policy, the demo's model of 135M parameters, for the same chat prompts with the same seeds, at
temperature 1, in one process per dtype, in turn. Prints

1. tokens per second in buffers of 8, 64 and 256 responses of at most 64 tokens: medians over pairs of calls, and their
   ratio (smallest - largest), also with vLLM's copy and comparison of the weights; and the share of the toolkit's draw
   of tokens in vLLM's sampling
2. seconds of PPO steps of the demo's sizes by stage, of which each rollout is done with both engines; the share of copy
   and comparison in the step with vLLM; and the ratio of the two steps.
"""

import argparse
import contextlib
import json
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

from benchmarks.rollout_learning import DEMO, as_argv
from utils.flags.parser import entry_point, parse_args

SIZES = {"num_rollouts": 32, "batch_size": 16, "rollout_batch_size": 256, "maxlen_prompt": 116, "maxlen_res": 64}
PARTS = ("load", "first_difference", "generate", "__call__")  # copy, comparison, sampling, draw


@dataclass
class Pairs:
    """A `Sampler` that samples with both engines, in alternating order, and returns vLLM's rollout.

    seconds: by engine, per call; parts: of vLLM's calls; tokens: of the responses by engine, per call.
    """

    samplers: dict[str, Callable]
    clock: Counter
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"own": [], "vllm": []})
    tokens: dict[str, list[int]] = field(default_factory=lambda: {"own": [], "vllm": []})
    parts: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, prompts, sampling, seed: int):
        """Does a pair of calls."""
        from benchmarks.timing import timed

        before, rollouts = Counter(self.clock), {}
        for name in sorted(self.samplers, reverse=len(self.parts) % 2 == 1):
            rollouts[name], seconds = timed(self.samplers[name], prompts, sampling, seed)
            self.seconds[name].append(seconds)
            self.tokens[name].append(int(rollouts[name].response_mask.sum()))
        self.parts.append({name: self.clock[name] - before[name] for name in PARTS})
        return rollouts["vllm"]

    def explain(self) -> str | None:
        """As vLLM's sampler does."""
        return self.samplers["vllm"].explain()


def measure_calls(owner, clock: Counter, *names: str) -> None:
    """Replaces functions of a class or an object by ones that add their seconds to `clock`."""

    def measured(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                clock[name] += time.perf_counter() - start

        return call

    for name in names:
        setattr(owner, name, measured(name, getattr(owner, name)))


def build(options: argparse.Namespace, dtype: str, out: Path):
    """Returns (run of train_ppo.py with vLLM, seconds by function of vLLM's part)."""
    import torch

    from ppo import build as builder
    from ppo.config import PPOConfig
    from ppo.decoding import vllm_engine
    from reward.model import load_scalar_model, save_scalar_model

    reward = out / "reward"  # with a random head, which costs as much as a trained one
    base = str(options.demo / "reward_base")
    save_scalar_model(load_scalar_model(base, torch.bfloat16, torch.device("cpu"), say=str), str(reward))
    paths = {"policy_model_path": options.demo / "model", "critic_model_path": reward, "reward_model_path": reward}
    flags = DEMO | paths | SIZES | {"data_path": options.demo / "prompts", "model_save_path": out / "run"}
    flags |= {"temperature": 1.0, "num_eval_prompts": 0, "critic_pretrain_steps": 0, "warmup_steps": 0}
    flags |= {"train_steps": options.steps + 1, "dtype": dtype, "rollout_engine": "vllm"}
    del flags["reward_fn"]
    run = builder.build(parse_args(PPOConfig, as_argv(flags)))
    clock = Counter()
    measure_calls(run.sampler.engine, clock, *PARTS[:-1])
    measure_calls(vllm_engine.Draw, clock, PARTS[-1])
    return run, clock


def rates(run, clock: Counter, batch: int, seconds: float) -> None:
    """Prints the first table's line of a batch size: pairs of calls for at least `seconds`, after a warm-up."""
    from ppo.decoding.sampling import Sampling
    from ppo.rollout import PolicySampler
    from ppo.types import PromptBatch

    def prompts(first: int, count: int) -> PromptBatch:
        return PromptBatch(
            [x.ids for x in run.prompts[first : first + count]], [[]] * count, list(range(first, first + count))
        )

    own = PolicySampler(run.models.policy, run.tokenizer, replace(run.config, rollout_batch_size=batch))
    pairs = Pairs({"own": own, "vllm": run.sampler}, clock)
    Pairs(pairs.samplers, clock)(prompts(0, min(batch, 8)), Sampling(), 0)
    start = time.perf_counter()
    while len(pairs.parts) < 2 or time.perf_counter() - start < seconds:
        first = len(pairs.parts) * batch % (len(run.prompts) - batch)
        pairs(prompts(first, batch), Sampling(), 0)
    own = [n / s for n, s in zip(pairs.tokens["own"], pairs.seconds["own"], strict=True)]
    alone = [n / part["generate"] for n, part in zip(pairs.tokens["vllm"], pairs.parts, strict=True)]
    whole = [n / s for n, s in zip(pairs.tokens["vllm"], pairs.seconds["vllm"], strict=True)]
    draw = median(part["__call__"] / part["generate"] for part in pairs.parts)
    print(
        f"batch {batch:3}: own {median(own):4.0f} tokens/s, vLLM {median(alone):4.0f}: {spread(alone, own)} x; with "
        f"copy and comparison {spread(whole, own)} x; draw {draw:.1%} of vLLM's time; {len(own)} pairs, "
        f"{median(pairs.tokens['own']):.0f} and {median(pairs.tokens['vllm']):.0f} tokens", flush=True,
    )  # fmt: skip


def steps(run, clock: Counter) -> None:
    """Prints the second table: the steps of the run but the first."""
    from ppo.rollout import PolicySampler
    from train_ppo import loop

    own = PolicySampler(
        run.models.policy, run.tokenizer, replace(run.config, rollout_batch_size=run.config.num_rollouts)
    )
    vllm, run.sampler = run.sampler, Pairs({"own": own, "vllm": run.sampler}, clock)
    with contextlib.closing(run.logger), run.lifecycle:
        loop(run)
    pairs, run.sampler = run.sampler, vllm
    lines = (Path(run.config.model_save_path) / "metrics.jsonl").read_text("utf-8").splitlines()
    rest = [row["seconds_score"] + row["seconds_update"] for row in map(json.loads, lines)][1:]
    whole = {name: [a + b for a, b in zip(pairs.seconds[name][1:], rest, strict=True)] for name in ("own", "vllm")}
    parts = {
        name: [part[name] / all_of for part, all_of in zip(pairs.parts[1:], whole["vllm"], strict=True)]
        for name in PARTS
    }
    print(
        f"step of {run.config.num_rollouts} responses: rollout own {median(pairs.seconds['own'][1:]):.2f} s, vLLM "
        f"{median(pairs.seconds['vllm'][1:]):.2f} s; score and update {median(rest):.2f} s; copy "
        f"{median(parts['load']):.1%}, comparison {median(parts['first_difference']):.1%} of the step with vLLM; "
        f"steps with vLLM {spread(whole['own'], whole['vllm'])} x as fast; {len(rest)} steps", flush=True,
    )  # fmt: skip


def spread(above: list[float], below: list[float]) -> str:
    """Returns the median ratio of pairs, the smallest and the largest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


def measure(options: argparse.Namespace, dtype: str) -> None:
    """Prints both tables of a dtype."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        run, clock = build(options, dtype, Path(folder))
        print(f"{dtype}, {torch.get_num_threads()} threads", flush=True)
        for batch in options.batch:
            rates(run, clock, batch, options.seconds)
        steps(run, clock)
        run.sampler.close()


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Measures each dtype in a process of its own, as vLLM cannot start twice in one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path(".demo/en"), help="made by python -m data.demo.english")
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each batch size, at least two pairs")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args(argv)
    for dtype in options.dtype:
        process = get_context("spawn").Process(target=measure, args=(options, dtype))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
