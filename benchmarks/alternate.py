"""Two ways of doing the same steps, each in a process of its own, one step of one and one of the other in turn.

What else the machine does then falls on both alike, and each has its own peak of memory.
"""

import resource
import statistics
from collections.abc import Callable
from multiprocessing import get_context

import torch

Steps = Callable[..., None]  # steps(connection, *arguments): see `stepper`


def lengths_of(kind: str, count: int) -> list[int]:
    """Tokens of `count` dialogues: "varlen" is log-uniform from 32 to 512 (seed 0), "equal" is 256."""
    if kind == "equal":
        return [256] * count
    spread = torch.rand(count, generator=torch.Generator().manual_seed(0))
    return (32 * (512 / 32) ** spread).int().tolist()


def peak() -> float:
    """GiB at most: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(sides: list[Steps], arguments: tuple, tokens: list[int]) -> list[tuple[list[float], float]]:
    """For each side (tokens a second of each step but the first, GiB at most). tokens: useful ones of each step.

    A side gets a message before each step, answers with its seconds, and after the last one with its peak of memory.
    """
    context, running = get_context("spawn"), []
    for steps in sides:
        here, there = context.Pipe()
        process = context.Process(target=steps, args=(there, *arguments), daemon=True)
        process.start()
        there.close()  # so that a side that dies ends the waiting for it
        running.append((here, process, []))
    for count in tokens:
        for connection, _, rates in running:
            connection.send("step")
            rates.append(count / connection.recv())
    results = []
    for connection, process, rates in running:
        connection.send("end")
        results.append((rates[1:], connection.recv()))
        process.join()
    return results


def print_comparison(kind: str, results: list[tuple[list[float], float]], target: float) -> None:
    """A line of the table: medians, their ratio, memory, and the ratio of every round."""
    (own, own_peak), (other, other_peak) = results
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    rates = f"{kind:8}{statistics.median(own):10.0f}{statistics.median(other):10.0f}"
    memory = f"{own_peak:10.2f}{other_peak:9.2f}"
    every = " ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"{rates}{statistics.median(ratios):8.2f}{target:8.1f}{memory}   {every}", flush=True)


def print_header() -> None:
    """What the columns of `print_comparison` are."""
    print(f"{'':8}{'ours':>10}{'Trainer':>10}{'ratio':>8}{'wanted':>8}{'GiB ours':>10}{'Trainer':>9}   all ratios")
