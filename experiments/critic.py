"""Measure the effect of critic pre-training:   python -m experiments.critic [--seeds 1 2 3] [flags]

Prints the critic's explained variance before and after pre-training, in the experiments' world (world.py) with the
settings of base.toml, on new responses of the initial policy. Other flags are those of train_ppo.py, such as
--critic_init_scale 1. Explained variance is 1 - Var(return - value) / Var(return) over all response tokens, with the
returns of λ = 1, which do not depend on the critic.
"""

import argparse
import contextlib
import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from experiments.settings import command
from experiments.world import WORLD, build_world
from ppo.advantages import gae
from ppo.build import build
from ppo.config import AMOUNTS, PRESETS, PPOConfig
from ppo.critic_metrics import explained_variance as explained
from ppo.critic_pretraining import Pretraining, loop
from ppo.experience import make_experience
from ppo.ranks import gather_batches
from ppo.run import Run
from ppo.score import score
from ppo.types import Experience
from utils.flags.parser import entry_point, parse_args

BUFFERS = 40
FRESH_PLACE = 1 << 20  # position of the first new prompt, after all positions of the pre-training


@torch.no_grad()
def fresh_experience(run: Run, first_place: int, buffers: int) -> Iterator[tuple[Experience, torch.Tensor]]:
    """Yields buffers of new responses and their returns (λ = 1), [batch, length]; the run's state does not change."""
    config, state = run.config, copy.deepcopy(run.state)
    state.next_place = first_place
    fresh = replace(run, state=state)
    for _ in range(buffers):
        prompts = fresh.next_prompts()
        rollout = run.sampler(prompts, run.sampling, config.seed)
        scores = score(rollout, prompts, run.models, run.reward_fn, run.tokenizer, config.temperature, config)
        experience = make_experience(*gather_batches(prompts, rollout, scores), state.moments, config)
        mask = experience.response_mask
        yield experience, gae(experience.rewards, experience.old_values, mask, config.gamma, lam=1.0)[1]


def explained_variance(run: Run) -> float:
    """Returns the explained variance of the critic over BUFFERS buffers."""
    values, returns = [], []
    for experience, to_come in fresh_experience(run, FRESH_PLACE, BUFFERS):
        values.append(experience.old_values[experience.response_mask])
        returns.append(to_come[experience.response_mask])
    return float(explained(torch.cat(returns), torch.cat(values)))


def measure(seed: int, world: Path, output: Path, flags: list[str]) -> tuple[float, float]:
    """Returns the explained variance before and after the pre-training of one seed."""
    argv = [*command("base", seed, world, output / f"critic-{seed}"), "--overwrite", "True", *flags]
    run = Pretraining(**vars(build(parse_args(PPOConfig, argv, PRESETS, AMOUNTS))))
    with contextlib.closing(run.logger), run.lifecycle:
        before = explained_variance(run)
        loop(run)
        if not run.lifecycle.exit_code:
            return before, explained_variance(run)
    sys.exit(run.lifecycle.exit_code)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Prints one row per seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=WORLD.parent)
    options, flags = parser.parse_known_args(argv)
    torch.set_num_threads(1)  # as in the other experiments
    world = options.output / "world"
    build_world(world)
    print("| seed | before | after |\n|---|---|---|")
    for seed in options.seeds:
        before, after = measure(seed, world, options.output, ["--checkpoint_per_step", "0", *flags])
        print(f"| {seed} | {before:.2f} | {after:.2f} |", flush=True)


if __name__ == "__main__":
    main()
