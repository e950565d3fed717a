"""The collectives: everything that ranks tell each other outside the engine.

Every function is a no-op for one process, and has to be called by all ranks in the same order.
"""

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of processes of the run; 1 before and without initialisation."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's place in 0 .. world_size - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """True on the one rank that writes files and talks to the user."""
    return rank() == 0


def barrier() -> None:
    """Waits until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def sum_ranks(x: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over ranks, on every rank. The argument is left alone."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device) -> bool:
    """True everywhere if it is True anywhere. One integer on the wire."""
    return bool(max_ranks(int(flag), device))


def max_ranks(number: int, device: torch.device) -> int:
    """The largest of all ranks' numbers, on every rank."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_objects(item) -> list:
    """[item of rank 0, item of rank 1, ...] on every rank. For small things between the run's own processes."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def ranks_where(flag: bool) -> str:
    """ "0, 3": the ranks whose flag is set, in words; "all" where none is."""
    return ", ".join(str(i) for i, is_set in enumerate(gather_objects(flag)) if is_set) or "all"


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks in rank order, on every rank. x: [rows, ...] of the same rows and dtype everywhere;
    trailing sizes may differ in dimension 1 and are padded with 0 (False) to the longest."""
    if world_size() == 1:
        return x
    if x.dim() > 1:
        longest = torch.tensor(x.shape[1], device=x.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        x = torch.nn.functional.pad(x, (0, int(longest) - x.shape[1]))
    wire = x.to(torch.uint8) if x.dtype == torch.bool else x
    parts = [torch.empty_like(wire) for _ in range(world_size())]
    dist.all_gather(parts, wire.contiguous())
    return torch.cat(parts).to(x.dtype)
