"""What sft_step.py and reward_step.py share: flags, our steps in turn, and the table. The Trainer: trainer_side.py."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.alternate import Steps, lengths_of, measure, peak, print_comparison, print_header

SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376}
TARGETS = {"varlen": 1.5, "equal": 1.0}


def parser_of(description: str, what: str, batch_size: int) -> argparse.ArgumentParser:
    """The flags of both benchmarks. what: items of a step, in words; batch_size: how many by default."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each side")
    parser.add_argument("--batch_size", type=int, default=batch_size, help=f"{what} a step")
    parser.add_argument("--micro_batch_tokens", type=int, default=4096, help="tokens of one of our forwards")
    parser.add_argument("--peer_batch_size", type=int, default=8, help=f"{what} of one of the Trainer's forwards")
    parser.add_argument("--autocast", action="store_true", help="the Trainer's weights in float32, cast to bf16")
    return parser


def compare(
    options: argparse.Namespace, what: str, save_start: Callable[[str], None], sides: list[Steps], rows: int = 1
) -> None:
    """Runs both sides on both kinds of lengths and prints the table. Sides get (folder, ids, options).

    save_start: writes the weights that both begin with into a folder; rows: sequences of an item of a step.
    """
    if options.batch_size % options.peer_batch_size:
        raise SystemExit("--batch_size must be a multiple of --peer_batch_size")
    print(f"{options.batch_size} {what} a step, median of {options.rounds} alternating rounds, useful tokens a second")
    print_header()
    with tempfile.TemporaryDirectory() as folder:
        save_start(folder)
        for kind, target in TARGETS.items():
            step = rows * options.batch_size
            lengths = lengths_of(kind, step * (options.rounds + 1))
            tokens = [sum(lengths[start : start + step]) for start in range(0, len(lengths), step)]
            print_comparison(kind, measure(sides, (folder, random_ids(lengths), options), tokens), target)


def random_ids(lengths: list[int]) -> list[list[int]]:
    """Sequences of these lengths, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 32000, (length,), generator=generator).tolist() for length in lengths]


def our_steps(connection, step: Callable[[list], object], items: list, batch_size: int) -> None:
    """`step` of the next items for every message; answers with its seconds, and last with the peak of memory."""
    for first in range(0, len(items), batch_size):
        connection.recv()
        start = time.perf_counter()
        step(items[first : first + batch_size])
        connection.send(time.perf_counter() - start)
    connection.recv()
    connection.send(peak())


def padded(sequences: Iterable[list[int]]) -> dict[str, torch.Tensor]:
    """Right-padded input_ids and attention_mask."""
    rows = [torch.tensor(ids) for ids in sequences]
    ids = pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}
