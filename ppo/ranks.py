"""Splits prompts over ranks, and gathers batches from them."""

import torch

from data.batching.collate import balance
from data.prompts import Prompt
from ppo.types import PromptBatch
from utils.distributed import gather_rows, rank, world_size
from utils.engine.engine import device


def own_share(prompts: list[Prompt], places: list[int]) -> PromptBatch:
    """Returns this rank's share of the prompts: equally many on each rank, with about the same number of tokens."""
    own = balance([len(prompt.ids) for prompt in prompts], world_size(), len(prompts) // world_size())[rank()]
    chosen = [prompts[i] for i in own]
    return batch_of(chosen, [places[i] for i in own])


def batch_of(prompts: list[Prompt], places: list[int]) -> PromptBatch:
    """Returns the prompts as a batch."""
    return PromptBatch([p.ids for p in prompts], [p.turns for p in prompts], places, [p.columns for p in prompts])


def gather_batches(prompts: PromptBatch, *batches):
    """Returns each batch with the rows of all ranks, on every rank, in the order of `places`. prompts: this rank's."""
    if world_size() == 1:
        return batches
    order = gather_rows(torch.tensor(prompts.places, device=device())).argsort()
    return tuple(batch.map(lambda rows: gather_rows(rows)[order]) for batch in batches)
