"""Splits prompts over ranks, and gathers batches from them."""

import torch

from data.batching.collate import balance
from data.prompts import Prompt
from ppo.types import PromptBatch
from utils.distributed import gather_rows, rank, world_size
from utils.engine.engine import device


def own_share(prompts: list[Prompt], places: list[int], size: int = 1) -> PromptBatch:
    """Returns this rank's share of the prompts: equally many on each rank, with about the same number of tokens.

    size: of the groups; each prompt has that many neighbouring rows.
    """
    own = balance([len(prompt.ids) for prompt in prompts], world_size(), len(prompts) // world_size())[rank()]
    chosen = [prompts[i] for i in own]
    return batch_of(chosen, [places[i] for i in own], size)


def batch_of(prompts: list[Prompt], places: list[int], size: int = 1) -> PromptBatch:
    """Returns the prompts as a batch with `size` rows each."""
    rows = [(p.ids, p.turns, place, p.columns) for p, place in zip(prompts, places, strict=True) for _ in range(size)]
    columns = map(list, zip(*rows, strict=True))
    return PromptBatch(*columns, members=[member for _ in prompts for member in range(size)])


def gather_batches(prompts: PromptBatch, *batches):
    """Returns each batch with the rows of all ranks, on every rank, by place and member. prompts: this rank's."""
    if world_size() == 1:
        return batches
    order = gather_rows(torch.tensor(prompts.order, device=device())).argsort()
    return tuple(batch.map(lambda rows: gather_rows(rows)[order]) for batch in batches)
