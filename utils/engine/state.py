"""What an engine has to keep to go on exactly: float32 weights and optimizer state, as this rank holds them.

DeepSpeed's own `load_checkpoint` unpickles whatever the file holds; here it is plain tensors, in safetensors, under the
parameters' names: `weight/NAME/START` is the stretch of that parameter, flat, that begins at element START, and
`exp_avg/…`, `exp_avg_sq/…` are Adam's moments of it; `step` counts Adam's steps, once one has been made. So any number
of ranks, in any ZeRO stage, can take it over. The weights that the forward reads follow from the float32 ones, so they
are not stored; nor are buffers, which are as the folder has them (`e_score_correction_bias` of a router is moved
in pre-training alone, by no code of transformers). Knows the names under which DeepSpeed's ZeRO optimizers hold them
(tests/end_to_end/test_resume.py and tests/distributed/test_other_ranks.py run every stage).
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from utils import distributed
from utils.engine.sharded_files import SharedState


@dataclass(frozen=True)
class Piece:
    """The stretch `start` … `start + length` of a parameter, and where it lies in a tensor that the optimizer steps."""

    name: str
    start: int
    length: int
    master: int  # which tensor, in the order of _masters()
    offset: int


def _masters(optimizer, zero_stage: int) -> list[torch.Tensor]:
    """The tensors that the inner optimizer steps: the parameters themselves, or this rank's flat float32 shares."""
    if zero_stage == 0:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return optimizer.fp32_partitioned_groups_flat if zero_stage == 3 else optimizer.single_partition_of_fp32_groups


def pieces(optimizer, zero_stage: int, rank: int, names: dict[nn.Parameter, str]) -> Iterator[Piece]:
    """What this rank holds. Stages 1 and 2 cut one long row of all parameters, stage 3 each parameter, into shares."""
    if zero_stage == 0:
        for i, parameter in enumerate(_masters(optimizer, 0)):
            yield Piece(names[parameter], 0, parameter.numel(), i, 0)
    elif zero_stage == 3:
        for i, group in enumerate(optimizer.fp16_groups):
            offset = 0
            for parameter in group:
                share = parameter.partition_numel()
                start, end = rank * share, min((rank + 1) * share, parameter.ds_numel)
                if start < end:
                    yield Piece(names[parameter], start, end - start, i, offset)
                offset += share
    else:
        groups = zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_padding, strict=True)
        for i, (group, padding) in enumerate(groups):
            share = len(_masters(optimizer, zero_stage)[i])
            place = -rank * share  # of the parameter's beginning, in this rank's share
            for parameter, behind in zip(group, padding, strict=True):
                first, end = max(place, 0), min(place + parameter.numel(), share)
                if first < end:
                    yield Piece(names[parameter], first - place, end - first, i, first)
                place += parameter.numel() + behind


def state_tensors(optimizer, zero_stage: int, rank: int, names: dict[nn.Parameter, str]) -> dict[str, torch.Tensor]:
    """Name -> flat tensor, not copied; `step` is a scalar."""
    inner = optimizer.optimizer if zero_stage else optimizer
    masters = _masters(optimizer, zero_stage)
    tensors = {}
    for piece in pieces(optimizer, zero_stage, rank, names):
        held = {"weight": masters[piece.master]} | inner.state.get(masters[piece.master], {})
        if "step" in held:
            tensors["step"] = torch.as_tensor(held.pop("step"))
        for kind, tensor in held.items():
            stretch = tensor.detach().flatten()[piece.offset : piece.offset + piece.length]
            tensors[f"{kind}/{piece.name}/{piece.start}"] = stretch
    return tensors


@torch.no_grad()
def load_state(optimizer, zero_stage: int, rank: int, names: dict[nn.Parameter, str], state: SharedState) -> None:
    """Takes over what `state_tensors` gave, on however many ranks. Collective: the forward's weights are gathered anew.

    Raises KeyError where the state is of another model.
    """
    state.check_sizes({name: getattr(p, "ds_numel", p.numel()) for p, name in names.items()})
    inner = optimizer.optimizer if zero_stage else optimizer
    masters = _masters(optimizer, zero_stage)
    with _rewriting(optimizer, zero_stage):
        for master in masters:
            inner.state.pop(master, None)
            if state.moments:
                inner.state[master] = {kind: torch.zeros_like(master) for kind in state.moments}
                # DeepSpeed's CPU Adam counts in a plain int, PyTorch's in a tensor of its own beside each weight.
                tensor = isinstance(inner, torch.optim.AdamW)
                steps = int(state.step)
                inner.state[master]["step"] = torch.tensor(float(steps), device=master.device) if tensor else steps
        for piece in pieces(optimizer, zero_stage, rank, names):
            master = masters[piece.master]
            for kind, held in {"weight": master, **{kind: inner.state[master][kind] for kind in state.moments}}.items():
                state.read(kind, piece.name, piece.start, held.view(-1)[piece.offset : piece.offset + piece.length])


@torch.no_grad()
def scale_weight(
    optimizer, zero_stage: int, rank: int, names: dict[nn.Parameter, str], name: str, factor: float
) -> None:
    """Multiplies the parameter `name` by `factor`, in float32 and where the forward reads it. Collective."""
    with _rewriting(optimizer, zero_stage):
        for piece in pieces(optimizer, zero_stage, rank, names):
            if piece.name == name:
                master = _masters(optimizer, zero_stage)[piece.master]
                master.view(-1)[piece.offset : piece.offset + piece.length] *= factor


@contextlib.contextmanager
def _rewriting(optimizer, zero_stage: int) -> Iterator[None]:
    """Inside, the float32 weights may be written; afterwards the weights that the forward reads follow from them."""
    if zero_stage == 3:
        optimizer.checkpoint_event_prologue()  # no rank holds whole weights from here to the epilogue
    yield
    if zero_stage == 3:
        for i in range(len(_masters(optimizer, zero_stage))):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer.checkpoint_event_epilogue()  # gathers the small ones that every rank keeps whole
    elif zero_stage:
        optimizer.update_lp_params()


def num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes that these take on disk, but for a header."""
    return sum(x.numel() * x.element_size() for x in tensors.values())


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models of one make hold the same weights, bit for bit.

    Either may be split over the ranks: then this rank compares what it holds of that one. Reads both once at most.
    """
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b.to(a.device)) for a, b in itertools.starmap(_held_of_both, pairs))


def _held_of_both(first: nn.Parameter, second: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tensors; where either is split (ZeRO-3), those of their elements that this rank holds of it, flat."""
    share = next((p.ds_tensor.ds_numel for p in (first, second) if hasattr(p, "ds_tensor")), None)
    if share is None:
        return first, second
    start = distributed.rank() * share

    def held(parameter: nn.Parameter) -> torch.Tensor:
        if hasattr(parameter, "ds_tensor"):
            return parameter.ds_tensor[: max(0, parameter.ds_numel - start)]  # the rest is padding
        return parameter.detach().flatten()[start : start + share]

    return held(first), held(second)
