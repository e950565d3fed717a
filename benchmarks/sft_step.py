"""Steps of SFT against the Trainer of transformers:   python benchmarks/sft_step.py [--rounds 3] [--autocast]

The same 58M LLaMA (hidden 512, 8 layers, 8 heads, intermediate 1376, vocabulary 32,000) from the same random weights,
the same dialogues of random ids in the same order, as many a step, their last two thirds learnt, gradients clipped at
1; one process, nothing recomputed.
Ours: bf16 weights with float32 ones and float32 AdamW moments beside them, under DeepSpeed (ZeRO-2).
Trainer: weights, gradients and moments in bf16, the fastest that it has; with --autocast float32 ones, cast to bf16 for
the products, as precise as ours. No DeepSpeed. Batches of --peer_batch_size, padded to their longest, gradients added
up to a step; the model's own loss with prompts at -100.
Lengths: log-uniform from 32 to 512, and all 256. Sides alternate step by step; the first one warms up. Prints useful
tokens a second (prompts included, padding not), medians over rounds, and each process's peak memory. Run it with the
MALLOC_ variables of utils/launch.sh.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.alternate import lengths_of, measure, peak, print_comparison, print_header

SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376}
TARGETS = {"ragged": 1.5, "equal": 1.0}


def save_start(folder: str) -> None:
    """The weights that both sides begin with."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=32000, max_position_embeddings=2048, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def ids_of(lengths: list[int]) -> list[list[int]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 32000, (length,), generator=generator).tolist() for length in lengths]


def ours(connection, folder: str, dialogues: list[list[int]], options: argparse.Namespace) -> None:
    """A step of our own for every message; answers with its seconds."""
    from data.dialogues import EncodedDialogue
    from sft.model import AnswerModel
    from sft.rows import Layout
    from sft.train import SFTConfig, stage_of
    from utils.engine import DTYPES, TrainEngine, device, init_distributed, shutdown_distributed
    from utils.fit import train_step
    from utils.models import load_causal_lm

    config = SFTConfig(
        hf_model_name_or_path=folder, data_path=["-"], batch_size=options.batch_size,
        micro_batch_tokens=options.micro_batch_tokens, packing=options.packing,
    )  # fmt: skip
    init_distributed()
    lm = load_causal_lm(folder, DTYPES[config.dtype], device(), say=str)
    items = [EncodedDialogue(ids, [t >= len(ids) // 3 for t in range(len(ids))]) for ids in dialogues]
    layout = Layout(config.packing, flat=False, max_tokens=config.micro_batch_tokens)
    stage = stage_of(config, lm, None, layout, [items], [])
    engine = TrainEngine(AnswerModel(lm), config, "model")
    for first in range(0, len(items), options.batch_size):
        connection.recv()
        start = time.perf_counter()
        train_step(engine, stage, layout.rows(items[first : first + options.batch_size], 1), config.lr)
        connection.send(time.perf_counter() - start)
    connection.recv()
    connection.send(peak())
    shutdown_distributed()


def trainers(connection, folder: str, dialogues: list[list[int]], options: argparse.Namespace) -> None:
    """The same of transformers' Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Alternate(TrainerCallback):
        def on_train_begin(self, *_, **__):
            connection.recv()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            connection.send(time.perf_counter() - self.start)
            connection.recv()
            self.start = time.perf_counter()

    def collate(batch: list[dict]) -> dict:
        rows = [torch.tensor(item["input_ids"]) for item in batch]
        labels = [torch.where(torch.arange(len(row)) >= len(row) // 3, row, -100) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=options.peer_batch_size, max_steps=options.rounds + 1, learning_rate=1e-5,
            gradient_accumulation_steps=options.batch_size // options.peer_batch_size, bf16=options.autocast,
            train_sampling_strategy="sequential", save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        dtype = torch.float32 if options.autocast else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        data = [{"input_ids": ids} for ids in dialogues]
        Trainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[Alternate()]).train()
    connection.send(peak())


def main() -> None:
    """Runs both sets and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each side")
    parser.add_argument("--batch_size", type=int, default=16, help="dialogues a step")
    parser.add_argument("--micro_batch_tokens", type=int, default=4096, help="tokens of one of our forwards")
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True, help="of our rows")
    parser.add_argument("--peer_batch_size", type=int, default=8, help="dialogues of one of the Trainer's forwards")
    parser.add_argument("--autocast", action="store_true", help="the Trainer's weights in float32, cast to bf16")
    options = parser.parse_args()
    if options.batch_size % options.peer_batch_size:
        parser.error("--batch_size must be a multiple of --peer_batch_size")
    print(
        f"{options.batch_size} dialogues a step, median of {options.rounds} alternating rounds, useful tokens a second"
    )
    print_header()
    with tempfile.TemporaryDirectory() as folder:
        save_start(folder)
        for kind, target in TARGETS.items():
            lengths = lengths_of(kind, options.batch_size * (options.rounds + 1))
            starts = range(0, len(lengths), options.batch_size)
            tokens = [sum(lengths[start : start + options.batch_size]) for start in starts]
            results = measure([ours, trainers], (folder, ids_of(lengths), options), tokens)
            print_comparison(kind, results, target)


if __name__ == "__main__":
    main()
