"""Steps of reward training against the Trainer of transformers:   python benchmarks/reward_step.py [--rounds 3]

The same 58M LLaMA (hidden 512, 8 layers, 8 heads, intermediate 1376, vocabulary 32,000) from the same random weights,
the same pairs of random ids in the same order, as many a step, gradients clipped at 1; one process, nothing recomputed.
Ours: bf16 weights with float32 ones and float32 AdamW moments beside them, under DeepSpeed (ZeRO-2).
Trainer: AutoModelForSequenceClassification with the pairwise loss in `compute_loss`; weights, gradients and moments in
bf16, the fastest that it has; with --autocast float32 ones, cast to bf16 for the products, as precise as ours. No
DeepSpeed. Batches of --peer_batch_size pairs, padded to the longest answer, gradients added up to a step.
Lengths of prompt and answer: log-uniform from 32 to 512, each side of a pair its own, and all 256. Sides alternate step
by step; the first one warms up. Prints useful tokens a second (padding not counted), medians over rounds, and each
process's peak memory. Run it with the MALLOC_ variables of utils/launch.sh.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.random_inputs import SIZES, random_classifier
from benchmarks.supervised import compare, our_steps, padded, parser_of


def save_start(folder: str) -> None:
    """The weights that both sides begin with, in the form that both read."""
    random_classifier(SIZES, torch.bfloat16, torch.device("cpu")).save_pretrained(folder)


def ours(connection, folder: str, dialogues: list[list[int]], options: argparse.Namespace) -> None:
    """A step of our own for every message. dialogues: two a pair, the chosen one first."""
    from reward.batches import Comparison
    from reward.config import RewardConfig
    from reward.model import load_scalar_model
    from reward.stage import stage_of
    from utils.engine.engine import DTYPES, TrainEngine, device, init_distributed, shutdown_distributed
    from utils.run.supervised_loop import train_step

    config = RewardConfig(
        hf_model_name_or_path=folder, data_path="-", batch_size=options.batch_size, lr=1e-5,
        micro_batch_tokens=options.micro_batch_tokens, dtype="bf16",
    )  # fmt: skip
    init_distributed()
    model = load_scalar_model(folder, DTYPES[config.dtype], device(), say=str)
    pairs = zip(dialogues[::2], dialogues[1::2], strict=True)
    items = [Comparison(list(pair), 1, [(0, 1)], [0.0], "all", "") for pair in pairs]
    engine, stage = TrainEngine(model, config, "reward model"), stage_of(config, model, None, items, None)
    our_steps(connection, lambda batch: train_step(engine, stage, batch, config.lr), items, options.batch_size)
    shutdown_distributed()


def collate(batch: list[dict]) -> dict:
    """Padded dialogues, the chosen ones first."""
    return padded(pair[side] for side in ("chosen", "rejected") for pair in batch)


def trainers(connection, folder: str, dialogues: list[list[int]], options: argparse.Namespace) -> None:
    """The same of transformers' Trainer."""
    from benchmarks.trainer_side import PairTrainer, trainer_steps

    load = partial(AutoModelForSequenceClassification.from_pretrained, folder)
    pairs = zip(dialogues[::2], dialogues[1::2], strict=True)
    data = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    trainer_steps(connection, options, lambda dtype: load(dtype=dtype), data, collate, PairTrainer)


def main() -> None:
    """Runs both sides and prints the table."""
    options = parser_of(__doc__, "pairs", batch_size=32).parse_args()
    compare(options, "pairs", save_start, [ours, trainers], rows=2)


if __name__ == "__main__":
    main()
