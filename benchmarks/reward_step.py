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
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, LlamaConfig

from benchmarks.alternate import lengths_of, measure, peak, print_comparison, print_header

SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376}
TARGETS = {"ragged": 1.5, "equal": 1.0}
Pairs = list[tuple[list[int], list[int]]]  # (chosen, rejected)


def save_start(folder: str) -> None:
    """The weights that both sides begin with, in the form that both read."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=32000, max_position_embeddings=2048, num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def pairs_of(lengths: list[int]) -> Pairs:
    """Random ids, two dialogues a pair."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 32000, (length,), generator=generator).tolist() for length in lengths]
    return list(zip(ids[::2], ids[1::2], strict=True))


def ours(connection, folder: str, pairs: Pairs, options: argparse.Namespace) -> None:
    """A step of our own for every message; answers with its seconds."""
    from reward.batches import Comparison
    from reward.config import RewardConfig
    from reward.model import load_scalar_model
    from reward.train import stage_of
    from utils.engine import DTYPES, TrainEngine, device, init_distributed, shutdown_distributed
    from utils.fit import train_step

    config = RewardConfig(
        hf_model_name_or_path=folder, data_path="-", batch_size=options.batch_size, lr=1e-5,
        micro_batch_tokens=options.micro_batch_tokens,
    )  # fmt: skip
    init_distributed()
    model = load_scalar_model(folder, DTYPES[config.dtype], device(), say=str)
    items = [Comparison(list(pair), 1, [(0, 1)], [0.0], "all", "") for pair in pairs]
    engine, stage = TrainEngine(model, config, "reward model"), stage_of(config, model, None, items, None)
    for first in range(0, len(items), options.batch_size):
        connection.recv()
        start = time.perf_counter()
        train_step(engine, stage, items[first : first + options.batch_size], config.lr)
        connection.send(time.perf_counter() - start)
    connection.recv()
    connection.send(peak())
    shutdown_distributed()


def trainers(connection, folder: str, pairs: Pairs, options: argparse.Namespace) -> None:
    """The same of transformers' Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class PairTrainer(Trainer):
        def compute_loss(self, model, inputs, **_):
            chosen, rejected = model(**inputs).logits.squeeze(-1).float().chunk(2)
            return -F.logsigmoid(chosen - rejected).mean()

    class Alternate(TrainerCallback):
        def on_train_begin(self, *_, **__):
            connection.recv()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            connection.send(time.perf_counter() - self.start)
            connection.recv()
            self.start = time.perf_counter()

    def collate(batch: list[dict]) -> dict:
        rows = [torch.tensor(pair[side]) for side in ("chosen", "rejected") for pair in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=options.peer_batch_size, max_steps=options.rounds + 1, learning_rate=1e-5,
            gradient_accumulation_steps=options.batch_size // options.peer_batch_size, bf16=options.autocast,
            train_sampling_strategy="sequential", save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        dtype = torch.float32 if options.autocast else torch.bfloat16
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        data = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
        PairTrainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[Alternate()]).train()
    connection.send(peak())


def main() -> None:
    """Runs both sets and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each side")
    parser.add_argument("--batch_size", type=int, default=32, help="pairs a step")
    parser.add_argument("--micro_batch_tokens", type=int, default=4096, help="tokens of one of our forwards")
    parser.add_argument("--peer_batch_size", type=int, default=8, help="pairs of one of the Trainer's forwards")
    parser.add_argument("--autocast", action="store_true", help="the Trainer's weights in float32, cast to bf16")
    options = parser.parse_args()
    if options.batch_size % options.peer_batch_size:
        parser.error("--batch_size must be a multiple of --peer_batch_size")
    print(f"{options.batch_size} pairs a step, median of {options.rounds} alternating rounds, useful tokens a second")
    print_header()
    with tempfile.TemporaryDirectory() as folder:
        save_start(folder)
        for kind, target in TARGETS.items():
            rows = 2 * options.batch_size
            lengths = lengths_of(kind, rows * (options.rounds + 1))
            tokens = [sum(lengths[start : start + rows]) for start in range(0, len(lengths), rows)]
            print_comparison(kind, measure([ours, trainers], (folder, pairs_of(lengths), options), tokens), target)


if __name__ == "__main__":
    main()
