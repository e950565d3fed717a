"""Shared by sft_step.py and reward_step.py: flags, our side of the comparison, and the table.

The same 58M LLaMA (random_inputs.py) starts from the same random weights, with the same sequences of random ids in the
same order, the same number per step, and gradients clipped at 1; one process, without recomputation.
Ours: bf16 weights with a float32 copy and float32 AdamW moments, under DeepSpeed (ZeRO-2).
Trainer: weights, gradients and moments in bf16, its fastest mode, or with --autocast in float32 with bf16 products, as
precise as ours; without DeepSpeed; batches of --peer_batch_size, padded to the longest sequence, with accumulation.
Lengths are log-uniform from 32 to 512, or all 256. The sides alternate step by step; the first step is a warm-up.
Prints useful tokens per second (without padding) as medians over rounds, and the peak memory of each process. Run it
with the MALLOC_ variables of utils/launch.sh.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.alternate import Steps, measure
from benchmarks.random_inputs import random_ids
from benchmarks.timing import peak, timed

TARGETS = {"ragged": 1.5, "equal": 1.0}


def parser_of(description: str, what: str, batch_size: int) -> argparse.ArgumentParser:
    """Returns the parser of both benchmarks. what: name of the items; batch_size: default number per step."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="measured steps per side")
    parser.add_argument("--batch_size", type=int, default=batch_size, help=f"{what} per step")
    parser.add_argument("--micro_batch_tokens", type=int, default=4096, help="tokens per forward pass of ours")
    parser.add_argument("--peer_batch_size", type=int, default=8, help=f"{what} per forward pass of the Trainer")
    parser.add_argument("--autocast", action="store_true", help="Trainer weights in float32, cast to bf16")
    return parser


def lengths_of(kind: str, count: int) -> list[int]:
    """Returns sequence lengths: "ragged" is log-uniform from 32 to 512 (seed 0), "equal" is 256."""
    if kind == "equal":
        return [256] * count
    return (32 * (512 / 32) ** torch.rand(count, generator=torch.Generator().manual_seed(0))).int().tolist()


def compare(
    options: argparse.Namespace, what: str, save_start: Callable[[str], None], sides: list[Steps], rows: int = 1
) -> None:
    """Runs both sides on both kinds of lengths and prints the table. Sides get (folder, ids, options).

    save_start: saves the initial weights in a folder. rows: sequences per item.
    """
    if options.batch_size % options.peer_batch_size:
        raise SystemExit("--batch_size must be a multiple of --peer_batch_size")
    print(f"{options.batch_size} {what} per step, median of {options.rounds} alternating rounds, useful tokens/s")
    print(f"{'':8}{'ours':>10}{'Trainer':>10}{'ratio':>8}{'target':>8}{'GiB ours':>10}{'Trainer':>9}   all ratios")
    with tempfile.TemporaryDirectory() as folder:
        save_start(folder)
        for kind, target in TARGETS.items():
            step = rows * options.batch_size
            lengths = lengths_of(kind, step * (options.rounds + 1))
            tokens = [sum(lengths[start : start + step]) for start in range(0, len(lengths), step)]
            ids = random_ids(lengths, torch.Generator().manual_seed(0))
            (own, own_peak), (other, other_peak) = measure(sides, (folder, ids, options), tokens)
            ratios = [a / b for a, b in zip(own, other, strict=True)]
            rates = f"{kind:8}{statistics.median(own):10.0f}{statistics.median(other):10.0f}"
            memory, every = f"{own_peak:10.2f}{other_peak:9.2f}", " ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{rates}{statistics.median(ratios):8.2f}{target:8.1f}{memory}   {every}", flush=True)


def our_steps(connection, step: Callable[[list], object], items: list, batch_size: int) -> None:
    """Runs `step` on the next items for each message and answers with the seconds, at the end with the peak memory."""
    for first in range(0, len(items), batch_size):
        connection.recv()
        connection.send(timed(step, items[first : first + batch_size])[1])
    connection.recv()
    connection.send(peak())


def padded(sequences: Iterable[list[int]]) -> dict[str, torch.Tensor]:
    """Returns right-padded input_ids and attention_mask."""
    rows = [torch.tensor(ids) for ids in sequences]
    ids = pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}
