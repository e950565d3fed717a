"""Measure the share of the matrix rate per phase of a PPO step:   python benchmarks/roofline.py [--steps 3]

Model, prompts and useful FLOPs are those of `ppo_step.py`. Prefill is a rollout with one token per response; decode is
the rest of a whole rollout. Optimizer steps have almost no FLOPs, so only their seconds are printed. All times are
medians without the first step.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from ppo_step import (
    IDS,
    RESPONSE,
    SAMPLES,
    build,
    forward_flops,
    matrix_rate,
    parse_options,
    prompt_batch,
    settings,
)  # fmt: skip

from benchmarks.timing import timed
from ppo.decoding.sampling import Sampling
from ppo.experience import make_experience
from ppo.models import Models
from ppo.rollout import PolicySampler
from ppo.score import score
from ppo.types import Rollout
from ppo.update import update
from utils.engine.engine import init_distributed, shutdown_distributed
from utils.moments import RunningMoments


class Stopwatch:
    """Seconds per phase of one step. stage: first word of the names of watched calls."""

    def __init__(self):
        self.stage = ""
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, phase: str, function: Callable, *args, **kwargs):
        """Calls the function and adds its seconds to the phase."""
        result, seconds = timed(function, *args, **kwargs)
        self.seconds[phase] += seconds
        return result

    def watch(self, owner, method: str, name: str) -> None:
        """Times calls of this method from now on, as a phase of the current stage."""
        original = getattr(owner, method)

        def watched(*args, **kwargs):
            return self.time(f"{self.stage} {name}", original, *args, **kwargs)

        setattr(owner, method, watched)


def watch_models(watch: Stopwatch, models: Models) -> None:
    """Times the forward passes of all models, and the backward passes and optimizer steps of trained models."""
    watch.watch(models.reference.model, "forward", "reference")
    watch.watch(models.reward.members[0].model.model, "forward", "reward model")
    for name, engine in models.engines().items():
        watch.watch(engine.module, "forward", name)
        watch.watch(engine, "backward", f"{name} backward")
        watch.watch(engine, "measure", f"{name} optimizer")
        watch.watch(engine, "apply", f"{name} optimizer")


def useful_flops(models: Models, rollout: Rollout) -> dict[str, float]:
    """Returns the useful FLOPs per phase."""
    scalar = forward_flops(models.critic.module, rollout, with_head=False)
    whole = forward_flops(models.policy.module, rollout, with_head=True)
    prompts_only = replace(rollout, attention_mask=rollout.attention_mask & ~rollout.response_mask)
    first = torch.zeros_like(rollout.response_mask)
    first[:, 0] = True  # one token per row needs logits
    prefill = forward_flops(models.policy.module, replace(prompts_only, response_mask=first), with_head=True)
    return {
        "rollout prefill": prefill, "rollout decode": whole - prefill,
        "score policy": whole, "score reference": whole, "score critic": scalar, "score reward model": scalar,
        "update policy": whole, "update policy backward": 2 * whole,
        "update critic": scalar, "update critic backward": 2 * scalar,
    }  # fmt: skip


def run_step(watch: Stopwatch, models: Models, step: int, config) -> Rollout:
    """Runs one PPO step under the stopwatch."""
    prompts, sampling = prompt_batch(), Sampling()
    watch.seconds.clear()
    watch.stage = "sampling"
    one_token = replace(config, maxlen_res=1)
    watch.time("rollout prefill", PolicySampler(models.policy, IDS, one_token), prompts, sampling, step)
    rollout = watch.time("rollout decode", PolicySampler(models.policy, IDS, config), prompts, sampling, step)
    watch.seconds["rollout decode"] -= watch.seconds["rollout prefill"]
    watch.stage = "score"
    scores = watch.time("score", score, rollout, prompts, models, None, IDS, 1.0, config)
    experience = make_experience(rollout, scores, RunningMoments(), config)
    watch.stage = "update"
    rates = (config.lr, config.critic_lr)
    watch.time("update", update, models.policy, models.critic, experience, config, step, *rates)
    return rollout


def main() -> None:
    """Runs the steps and prints the table."""
    options = parse_options(__doc__)
    config = settings(options)
    init_distributed()
    models, watch, times = build(config), Stopwatch(), defaultdict(list)
    watch_models(watch, models)
    for step in range(options.steps + 1):
        rollout = run_step(watch, models, step, config)
        for phase, seconds in watch.seconds.items() if step else ():
            times[phase].append(seconds)
    rate, flops = matrix_rate(config.dtype), useful_flops(models, rollout)
    flops |= {stage: sum(n for phase, n in flops.items() if phase.startswith(stage)) for stage in ("score", "update")}
    print(f"{SAMPLES} samples of {RESPONSE} response tokens, {int(rollout.attention_mask.sum())} real tokens in total")
    for phase in sorted(phase for phase in times if not phase.startswith("sampling")):
        seconds = statistics.median(times[phase])
        share = f"{flops[phase] / 1e9:6.0f} GFLOP  {flops[phase] / seconds / rate:4.0%}" if phase in flops else ""
        print(f"{phase:26} {seconds:7.3f} s {share}")
    shutdown_distributed()


if __name__ == "__main__":
    main()
