"""Compare steps of reward training with the Trainer of transformers:   python benchmarks/reward_step.py [--rounds 3]

See supervised.py. Each side of a pair has its own length. The Trainer uses AutoModelForSequenceClassification with the
pairwise loss in `compute_loss`.
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
    """Saves the initial weights of both sides."""
    random_classifier(SIZES, torch.bfloat16, torch.device("cpu")).save_pretrained(folder)


def ours(connection, folder: str, dialogues: list[list[int]], options: argparse.Namespace) -> None:
    """Our side of `alternate.measure`. dialogues: two per pair, the chosen one first."""
    from reward.batches import Comparison
    from reward.config import RewardConfig
    from reward.model import load_scalar_model
    from reward.stage import build_stage
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
    engine, stage = TrainEngine(model, config, "reward model"), build_stage(config, model, None, iter([items]), None)
    our_steps(connection, lambda batch: train_step(engine, stage, batch, config.lr), items, options.batch_size)
    shutdown_distributed()


def collate(batch: list[dict]) -> dict:
    """Returns padded dialogues, the chosen ones first."""
    return padded(pair[side] for side in ("chosen", "rejected") for pair in batch)


def trainers(connection, folder: str, dialogues: list[list[int]], options: argparse.Namespace) -> None:
    """The Trainer's side of `alternate.measure`."""
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
