"""What share of the machine's matrix rate each phase of a PPO step reaches:   python benchmarks/roofline.py [--steps 3]

The model, prompts and counting of `ppo_step.py`: useful FLOPs only, none for padding, for prompt tokens' logits or for
what is computed again. Prefill is a rollout of one token a response, decoding the rest of a whole one. An optimizer
step has next to no FLOPs: its seconds stand alone. Times are medians, the first step is not counted.
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
from ppo.rollout import generate
from ppo.score import score
from ppo.types import Rollout
from ppo.update import update
from utils.engine.engine import init_distributed, shutdown_distributed
from utils.moments import RunningMoments


class Stopwatch:
    """Seconds by phase, of one step; `stage` is the first word of the phases that watched calls belong to."""

    def __init__(self):
        self.stage = ""
        self.inside = 0.0  # seconds of watched calls within the one at hand
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, phase: str, function: Callable, *args, **kwargs):
        """Calls the function and adds what it took to the phase."""
        result, seconds = timed(function, *args, **kwargs)
        self.seconds[phase] += seconds
        return result

    def watch(self, owner, method: str, name: str) -> None:
        """From now on calls of this method are timed, as a phase of the stage at hand, less watched calls within."""
        original = getattr(owner, method)

        def watched(*args, **kwargs):
            phase = f"{self.stage} {name}"
            outside, self.inside, before = self.inside, 0.0, self.seconds[phase]
            result = self.time(phase, original, *args, **kwargs)
            taken = self.seconds[phase] - before
            self.seconds[phase] -= self.inside  # the critic's optimizer step makes the policy's
            self.inside = outside + taken
            return result

        setattr(owner, method, watched)


def watch_models(watch: Stopwatch, models: Models) -> None:
    """Times forwards of all four, and backward passes and optimizer steps of those that learn."""
    watch.watch(models.reference.model, "forward", "reference")
    watch.watch(models.reward.members[0].model.model, "forward", "reward model")
    for name, engine in models.engines().items():
        watch.watch(engine.module, "forward", name)
        watch.watch(engine, "backward", f"{name} backward")
        watch.watch(engine, "step", f"{name} optimizer")


def useful_flops(models: Models, rollout: Rollout) -> dict[str, float]:
    """Of each phase that has any."""
    scalar = forward_flops(models.critic.module, rollout, with_head=False)
    whole = forward_flops(models.policy.module, rollout, with_head=True)
    prompts_only = replace(rollout, attention_mask=rollout.attention_mask & ~rollout.response_mask)
    first = torch.zeros_like(rollout.response_mask)
    first[:, 0] = True  # one token a row gets logits
    prefill = forward_flops(models.policy.module, replace(prompts_only, response_mask=first), with_head=True)
    return {
        "rollout prefill": prefill, "rollout decode": whole - prefill,
        "score policy": whole, "score reference": whole, "score critic": scalar, "score reward model": scalar,
        "update policy": whole, "update policy backward": 2 * whole,
        "update critic": scalar, "update critic backward": 2 * scalar,
    }  # fmt: skip


def run_step(watch: Stopwatch, models: Models, step: int, config) -> Rollout:
    """One PPO step under the stopwatch."""
    prompts, sampling = prompt_batch(), Sampling()
    watch.seconds.clear()
    watch.stage = "sampling"
    one_token = replace(config, maxlen_res=1)
    watch.time("rollout prefill", generate, models.policy, prompts, sampling, step, IDS, one_token)
    rollout = watch.time("rollout decode", generate, models.policy, prompts, sampling, step, IDS, config)
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
    print(f"{SAMPLES} samples of {RESPONSE} response tokens, {int(rollout.attention_mask.sum())} real tokens in all")
    for phase in sorted(phase for phase in times if not phase.startswith("sampling")):
        seconds = statistics.median(times[phase])
        share = f"{flops[phase] / 1e9:6.0f} GFLOP  {flops[phase] / seconds / rate:4.0%}" if phase in flops else ""
        print(f"{phase:26} {seconds:7.3f} s {share}")
    shutdown_distributed()


if __name__ == "__main__":
    main()
