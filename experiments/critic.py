"""What the critic's pre-training gives, as explained variance:   python -m experiments.critic [--seeds 1 2 3] [flags]

In the experiments' world (experiments/world.py), by the settings of base.toml: the critic before and after its
pre-training, on fresh responses of the policy that has not moved. Further flags are train_ppo.py's, such as
--critic_init_scale 1. The variance explained is that of the sums of rewards to come (returns with λ = 1), which do not
depend on the critic: 1 - Var(return - value) / Var(return), over all response tokens.
"""

import argparse
import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import torch

from experiments.settings import command
from experiments.world import WORLD, build_world
from ppo.advantages import gae
from ppo.build import build
from ppo.config import AMOUNTS, PRESETS, PPOConfig
from ppo.decoding.sampling import Sampling
from ppo.experience import make_experience
from ppo.ranks import gather_batches
from ppo.rollout import generate
from ppo.run import Run
from ppo.score import score
from train_ppo import loop
from utils.flags.parser import entry_point, parse_args

BUFFERS = 40
FRESH_PLACE = 1 << 20  # place in the run of the first fresh prompt: beyond those of the pre-training


@torch.no_grad()
def explained_variance(run: Run) -> float:
    """Of the critic as it is, over BUFFERS buffers. The run's state is left as it was."""
    config, state, values, returns = run.config, copy.deepcopy(run.state), [], []
    sampling = Sampling(config.temperature)
    state.next_place = FRESH_PLACE
    fresh = replace(run, state=state)
    for _ in range(BUFFERS):
        prompts = fresh.next_prompts()
        rollout = generate(run.models.policy, prompts, sampling, config.seed, run.tokenizer, config)
        scores = score(rollout, prompts, run.models, run.reward_fn, run.tokenizer, sampling.temperature, config)
        experience = make_experience(*gather_batches(prompts, rollout, scores), state.moments, config)
        mask = experience.response_mask
        to_come = gae(experience.rewards, experience.old_values, mask, config.gamma, lam=1.0)[1]
        values.append(experience.old_values[mask])
        returns.append(to_come[mask])
    values, returns = torch.cat(values), torch.cat(returns)
    return float(1.0 - (returns - values).var() / returns.var())


class Pretraining(Run):
    """A run that ends where the policy would begin to move."""

    @property
    def finished(self) -> bool:
        """Whether the critic has made its steps alone."""
        return self.state.step >= self.config.critic_pretrain_steps


def measure(seed: int, world: Path, output: Path, flags: list[str]) -> tuple[float, float]:
    """Explained variance before and after the pre-training of one seed."""
    argv = [*command("base", seed, world, output / f"critic-{seed}"), "--overwrite", "True", *flags]
    run = Pretraining(**vars(build(parse_args(PPOConfig, argv, PRESETS, AMOUNTS))))
    with contextlib.closing(run.logger), run.lifecycle:
        before = explained_variance(run)
        loop(run)
        return before, explained_variance(run)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Prints a row for each seed."""
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
