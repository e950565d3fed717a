"""Compare SFT steps with the Trainer of transformers:   python benchmarks/sft_step.py [--rounds 3] [--autocast]

See supervised.py. The last two thirds of each dialogue are trained on; the Trainer uses the model's own loss.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoModelForCausalLM

from benchmarks.random_inputs import SIZES, random_lm
from benchmarks.supervised import compare, our_steps, padded, parser_of


def save_start(folder: str) -> None:
    """Saves the initial weights of both sides."""
    random_lm(SIZES | {"pad_token_id": 0}, torch.bfloat16, torch.device("cpu")).save_pretrained(folder)


def ours(connection, folder: str, dialogues: list[list[int]], options: argparse.Namespace) -> None:
    """Our side of `alternate.measure`."""
    from data.dialogues import EncodedDialogue
    from sft.config import SFTConfig
    from sft.model import AnswerModel
    from sft.packed_batches import Layout
    from sft.stage import build_stage
    from utils.engine.engine import DTYPES, TrainEngine, device, init_distributed, shutdown_distributed
    from utils.models.load import load_causal_lm
    from utils.run.supervised_loop import train_step

    config = SFTConfig(
        hf_model_name_or_path=folder, data_path=["-"], batch_size=options.batch_size,
        micro_batch_tokens=options.micro_batch_tokens, packing=options.packing, dtype="bf16",
    )  # fmt: skip
    init_distributed()
    lm = load_causal_lm(folder, DTYPES[config.dtype], device(), say=str)
    items = [EncodedDialogue(ids, [t >= len(ids) // 3 for t in range(len(ids))]) for ids in dialogues]
    layout = Layout(config.packing, flat=False, max_tokens=config.micro_batch_tokens)
    stage = build_stage(config, lm, None, layout, iter([items]), [])
    engine = TrainEngine(AnswerModel(lm), config, "model")

    def step(batch: list[EncodedDialogue]) -> None:
        train_step(engine, stage, layout.rows(batch, 1), config.lr)

    our_steps(connection, step, items, options.batch_size)
    shutdown_distributed()


def collate(batch: list[dict]) -> dict:
    """Returns padded dialogues with labels at their last two thirds."""
    inputs = padded(item["ids"] for item in batch)
    starts = torch.tensor([len(item["ids"]) // 3 for item in batch])[:, None]
    answers = inputs["attention_mask"].bool() & (torch.arange(inputs["input_ids"].shape[1]) >= starts)
    return inputs | {"labels": inputs["input_ids"].masked_fill(~answers, -100)}


def trainers(connection, folder: str, dialogues: list[list[int]], options: argparse.Namespace) -> None:
    """The Trainer's side of `alternate.measure`."""
    from benchmarks.trainer_side import trainer_steps

    load = partial(AutoModelForCausalLM.from_pretrained, folder)
    data = [{"ids": ids} for ids in dialogues]
    trainer_steps(connection, options, lambda dtype: load(dtype=dtype), data, collate)


def main() -> None:
    """Runs both sides and prints the table."""
    parser = parser_of(__doc__, "dialogues", batch_size=16)
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True, help="--packing of ours")
    compare(parser.parse_args(), "dialogues", save_start, [ours, trainers])


if __name__ == "__main__":
    main()
