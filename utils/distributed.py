"""Collectives outside of the engine. All ranks call them in the same order; with one process they do nothing."""

import functools
import os
import socket

import torch
import torch.distributed as dist


def world_size() -> int:
    """Returns the number of processes; 1 without initialisation."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's rank; 0 without initialisation."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def sum_ranks(x: torch.Tensor) -> torch.Tensor:
    """Returns the element-wise sum over ranks, on all ranks. Does not change `x`."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device) -> bool:
    """Returns True on all ranks if `flag` is True on any."""
    return bool(max_ranks(int(flag), device))


def any_of_group(flag: bool, group: dist.ProcessGroup) -> bool:
    """Returns True on all ranks of a group for messages between CPUs if `flag` is True on any of them."""
    largest = torch.tensor(int(flag))
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    return bool(largest)


def max_ranks(number: int, device: torch.device) -> int:
    """Returns the largest number of all ranks, on all ranks."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_objects(item) -> list:
    """Returns [item of rank 0, item of rank 1, ...] on all ranks. For small objects."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def ranks_where(flag: bool) -> str:
    """Returns the ranks whose flag is set, as "0, 3"; "all" if there are none."""
    return ", ".join(str(i) for i, is_set in enumerate(gather_objects(flag)) if is_set) or "all"


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns the rows of all ranks in rank order, on all ranks. x: [rows, ...], with equally many rows on all ranks.

    Sizes of dimension 1 may differ, and are padded with 0 (False) to the largest.
    """
    if world_size() == 1:
        return x
    if x.dim() > 1:
        x = torch.nn.functional.pad(x, (0, max_ranks(x.shape[1], x.device) - x.shape[1]))
    wire = x.to(torch.uint8) if x.dtype == torch.bool else x
    parts = [torch.empty_like(wire) for _ in range(world_size())]
    dist.all_gather(parts, wire.contiguous())
    return torch.cat(parts).to(x.dtype)


def node_ranks() -> list[int]:
    """Returns the ranks on this rank's host. Collective."""
    hosts = gather_objects(socket.gethostname())
    return [i for i, host in enumerate(hosts) if host == hosts[rank()]]


def share_in_node(item, ranks: list[int]):
    """Returns the first rank's item on all ranks of a node, as a copy made by pickle. ranks: as of `node_ranks`."""
    if len(ranks) == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, ranks[0], _group_of(dist.group.WORLD, *ranks), torch.device("cpu"))
    return items[0]


@functools.cache
def _group_of(world: dist.ProcessGroup, *ranks: int) -> dist.ProcessGroup:
    """Returns a group for messages between the CPUs of some ranks, which all of them call. world: for the cache."""
    return dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)


def message_store(prefix: str) -> dist.Store:
    """Returns the process group's key-value store for keys of a prefix; no collective. It also serves other threads."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives its ranks
    return dist.PrefixStore(f"{start}/{prefix}", _own_connection(dist.distributed_c10d._get_default_store()))


@functools.cache
def _own_connection(store: dist.Store) -> dist.Store:
    """Returns another connection to a store. The first one is busy while a collective waits in it."""
    return store.clone()
