"""Compare losses of the critic:   python -m experiments.value_loss [--setting base] [--seeds 1 2 3 4 5]

Trains copies of a setting's critic on the same responses of its initial policy, with a new head: by squared errors, and
by HL-Gauss, the cross-entropy to a histogram of the return (Farebrother et al. 2024, "Stop Regressing"). Prints the
explained variance on new responses. The learning rate of each loss is the best one of LEARNING_RATES on seed 101.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from experiments.critic import FRESH_PLACE, fresh_experience
from experiments.intervals import over_seeds
from experiments.settings import command
from experiments.world import OPTIONAL, WORLD, build_world
from ppo.build import build
from ppo.config import AMOUNTS, PRESETS, PPOConfig
from ppo.critic_metrics import explained_variance
from ppo.types import Batch
from reward.model import ScalarModel
from utils.flags.parser import entry_point, parse_args
from utils.tensors import before

LEARNING_RATES = (3e-5, 1e-4, 3e-4)
TUNING_SEED = 101
BUFFERS, FRESH_BUFFERS, EPOCHS, BATCH = 300, 100, 3, 16
BINS, SMOOTHING = 51, 0.75  # of the histogram: from -RANGE to RANGE deviations; deviation of a target in bins
RANGE = 5.0


@dataclass(frozen=True)
class Responses(Batch):
    """sequences [n, length], response_mask, returns [n, length] in deviations from the mean of the training set."""

    sequences: torch.Tensor
    response_mask: torch.Tensor
    returns: torch.Tensor


@dataclass(frozen=True)
class Loss:
    """outputs: of the head. of: (outputs [tokens, outputs], returns [tokens]) -> mean loss. values: of the outputs."""

    outputs: int
    of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    values: Callable[[torch.Tensor], torch.Tensor]


def _histogram(returns: torch.Tensor) -> torch.Tensor:
    """Returns the share of N(return, SMOOTHING bins) in each bin, [tokens, BINS]."""
    edges = torch.linspace(-RANGE, RANGE, BINS + 1)
    width = float(edges[1] - edges[0])
    inside = returns.clamp(-RANGE + width, RANGE - width)[:, None]
    shares = torch.special.ndtr((edges - inside) / (SMOOTHING * width)).diff(dim=1)
    return shares / shares.sum(1, keepdim=True)


def _expected(logits: torch.Tensor) -> torch.Tensor:
    edges = torch.linspace(-RANGE, RANGE, BINS + 1)
    return logits.softmax(1) @ ((edges[1:] + edges[:-1]) / 2)


LOSSES = {
    "squared error": Loss(1, lambda x, returns: F.mse_loss(x[:, 0], returns), lambda x: x[:, 0]),
    "HL-Gauss": Loss(BINS, lambda x, returns: F.cross_entropy(x, _histogram(returns)), _expected),
}


def collect(run, first_place: int, buffers: int) -> Responses:
    """Returns new responses of the policy with their returns, as they are."""
    parts = [
        (experience.sequences, experience.response_mask, returns)
        for experience, returns in fresh_experience(run, first_place, buffers)
    ]
    length = max(sequences.shape[1] for sequences, _, _ in parts)
    columns = ([F.pad(x, (0, length - x.shape[1])) for x in column] for column in zip(*parts, strict=True))
    return Responses(*map(torch.cat, columns))


def train(critic: ScalarModel, data: Responses, new: Responses, loss: Loss, lr: float, seed: int) -> float:
    """Returns the explained variance on `new` after EPOCHS passes over `data`."""
    torch.manual_seed(seed)
    backbone = copy.deepcopy(critic.backbone)
    head = torch.nn.Linear(critic.head.in_features, loss.outputs)
    torch.nn.init.zeros_(head.weight)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr, betas=(0.9, 0.95), weight_decay=0.0)

    def outputs(part: Responses) -> torch.Tensor:
        return head(backbone(input_ids=part.sequences, use_cache=False).last_hidden_state[before(part.response_mask)])

    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data)).split(BATCH):
            part = data.rows(rows)
            optimizer.zero_grad()
            loss.of(outputs(part), part.returns[part.response_mask]).backward()
            torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
            optimizer.step()
    with torch.no_grad():
        values = torch.cat([loss.values(outputs(new.rows(rows))) for rows in torch.arange(len(new)).split(64)])
    return float(explained_variance(new.returns[new.response_mask], values))


def measure(setting: str, seed: int, world: Path, rates: dict[str, tuple[float, ...]]) -> dict[str, list[float]]:
    """Returns the explained variance by loss, for each of its learning rates."""
    argv = [*command(setting, seed, world, world.parent / f"value_loss-{seed}"), "--overwrite", "True"]
    run = build(parse_args(PPOConfig, [*argv, "--checkpoint_per_step", "0"], PRESETS, AMOUNTS))
    with contextlib.closing(run.logger), run.lifecycle:
        data, new = collect(run, 0, BUFFERS), collect(run, FRESH_PLACE, FRESH_BUFFERS)
        known = data.returns[data.response_mask]
        mean, deviation = known.mean(), known.std()
        data, new = (Responses(x.sequences, x.response_mask, (x.returns - mean) / deviation) for x in (data, new))
        critic = run.models.critic.module
        return {name: [train(critic, data, new, LOSSES[name], lr, seed) for lr in rates[name]] for name in rates}


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Prints the choice of learning rates and a row per seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--setting", default="base")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--output", type=Path, default=WORLD.parent)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in the other experiments
    world = options.output / "world"
    build_world(world, OPTIONAL if options.setting.startswith("long") else frozenset())
    tried = measure(options.setting, TUNING_SEED, world, dict.fromkeys(LOSSES, LEARNING_RATES))
    best = {name: LEARNING_RATES[found.index(max(found))] for name, found in tried.items()}
    for name, found in tried.items():
        print(f"{name}: " + ", ".join(f"{lr:g} {x:.3f}" for lr, x in zip(LEARNING_RATES, found, strict=True)))
    print("| seed | " + " | ".join(LOSSES) + " |\n" + "|---" * (1 + len(LOSSES)) + "|", flush=True)
    gains = []
    for seed in options.seeds:
        found = measure(options.setting, seed, world, {name: (lr,) for name, lr in best.items()})
        print(f"| {seed} | " + " | ".join(f"{x:.3f}" for [x] in found.values()) + " |", flush=True)
        gains.append(found["HL-Gauss"][0] - found["squared error"][0])
    mean, half = over_seeds(gains)
    print(f"HL-Gauss - squared error: {mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]")


if __name__ == "__main__":
    main()
