"""The state of an engine that an exact resume needs: float32 weights and Adam's moments, as this rank holds them.

DeepSpeed's `load_checkpoint` unpickles files. Here the state is plain tensors for safetensors: `weight/NAME/START` is
the part of the flat parameter NAME that begins at element START, `exp_avg/…` and `exp_avg_sq/…` are Adam's moments of
it, and `step` is the number of Adam's steps, if there are any. Any number of ranks in any ZeRO stage can load it.
The bf16 weights of the forward are not saved: they are the rounded float32 ones. Neither are buffers, which training
does not change and the model's folder contains.
"""

import contextlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import nn

from utils import distributed

_KEY = re.compile(r"(\w+)/([^/]+)/([0-9]{1,15})")  # of a tensor in a file
_MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


@dataclass(frozen=True)
class Piece:
    """The elements `start` … `start + length` of a flat parameter, at `offset` in a tensor that the optimizer steps."""

    name: str
    start: int
    length: int
    master: int  # index of that tensor in stepped()
    offset: int


def stepped(optimizer, zero_stage: int) -> list[torch.Tensor]:
    """Returns what the inner optimizer steps: the parameters (stage 0), or this rank's flat float32 partitions."""
    if zero_stage == 0:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return optimizer.fp32_partitioned_groups_flat if zero_stage == 3 else optimizer.single_partition_of_fp32_groups


def pieces(optimizer, zero_stage: int, rank: int, names: dict[nn.Parameter, str]) -> Iterator[Piece]:
    """Yields what this rank holds. Stages 1 and 2 partition one flat tensor, stage 3 each parameter."""
    if zero_stage == 0:
        for i, parameter in enumerate(stepped(optimizer, 0)):
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
            share = len(stepped(optimizer, zero_stage)[i])
            place = -rank * share  # where the parameter begins, relative to this rank's partition
            for parameter, behind in zip(group, padding, strict=True):
                first, end = max(place, 0), min(place + parameter.numel(), share)
                if first < end:
                    yield Piece(names[parameter], first - place, end - first, i, first)
                place += parameter.numel() + behind


def state_tensors(optimizer, zero_stage: int, rank: int, names: dict[nn.Parameter, str]) -> dict[str, torch.Tensor]:
    """Returns name -> flat tensor, not copied; `step` is a scalar."""
    inner = optimizer.optimizer if zero_stage else optimizer
    masters = stepped(optimizer, zero_stage)
    tensors = {}
    for piece in pieces(optimizer, zero_stage, rank, names):
        master = masters[piece.master]
        # Without ZeRO, a parameter that has had no gradient yet has no moments.
        moments = inner.state.get(master) or (dict.fromkeys(_MOMENTS, torch.zeros_like(master)) if inner.state else {})
        held = {"weight": master} | moments
        if "step" in held:
            tensors["step"] = torch.as_tensor(held.pop("step"))
        for kind, tensor in held.items():
            part = tensor.detach().flatten()[piece.offset : piece.offset + piece.length]
            tensors[f"{kind}/{piece.name}/{piece.start}"] = part
    return tensors


class SharedState:
    """Files of `KIND/PARAMETER/START`, parts of flat parameters, and `step`. Reads only what is asked for.

    `moments`: the kinds besides `weight`; before the first step there are none, and `step` is None. Raises ValueError
    unless all tensors are flat and float32, and the parts of each kind are all elements of all parameters, once.
    """

    def __init__(self, paths: list[str]):
        self.step: int | None = None
        self._parts = defaultdict(list)  # (kind, parameter) -> [(start, end, slice of a file)]
        for path in paths:
            file = safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                if key == "step":
                    self._set_step(file.get_tensor(key))
                else:
                    self._add(key, file.get_slice(key))
        self.moments = sorted({kind for kind, _ in self._parts} - {"weight"})
        self._check()

    def _add(self, key: str, part) -> None:
        match, shape, dtype = _KEY.fullmatch(key), part.get_shape(), part.get_dtype()
        if not match or len(shape) != 1 or dtype != "F32":
            raise ValueError(f"{key} is {dtype} {shape}, not flat and float32 with a name KIND/PARAMETER/START")
        kind, name, start = match.groups()
        self._parts[kind, name].append((int(start), int(start) + shape[0], part))

    def _check(self) -> None:
        if not self._parts:
            raise ValueError("its files hold no weights")
        if self.moments != (list(_MOMENTS) if self.step is not None else []):
            raise ValueError(f"it has step {self.step} and moments {self.moments}, not both {' and '.join(_MOMENTS)}")
        sizes = {kind: {} for kind in ("weight", *self.moments)}
        for (kind, name), parts in self._parts.items():
            parts.sort(key=lambda part: part[:2])
            sizes[kind][name] = end = parts[-1][1]
            if [start for start, _, _ in parts] != [0, *(end for _, end, _ in parts[:-1])]:
                raise ValueError(f"the parts of {kind}/{name}, {end} elements, overlap or have gaps")
        for kind in self.moments:
            if other := sizes["weight"].items() ^ sizes[kind].items():
                raise ValueError(f"weight and {kind} have other sizes of {min(other)[0]}")

    def _set_step(self, x: torch.Tensor) -> None:
        step = float(x) if x.numel() == 1 else -1.0
        if not (0 <= step < 2**31 and step.is_integer() and self.step in (None, int(step))):
            raise ValueError("step is not one whole number, the same in all files")
        self.step = int(step)

    def check_sizes(self, sizes: dict[str, int]) -> None:
        """Raises KeyError if `sizes`, parameter name -> number of elements, are not those of the files."""
        weights = {name: found for (kind, name), found in self._parts.items() if kind == "weight"}
        for name in sizes | weights:
            held = sum(end - start for start, end, _ in weights.get(name, []))
            if held != sizes.get(name, 0):
                raise KeyError(f"{name} has {sizes.get(name, 0)} elements, not {held}")

    def read(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Fills the flat tensor `into` with a parameter's elements from `start` on, as far as the files hold them."""
        for begin, end, part in self._parts[kind, name]:
            first, last = max(start, begin), min(start + len(into), end)
            if first < last:
                into[first - start : last - start] = part[first - begin : last - begin]


@torch.no_grad()
def load_state(optimizer, zero_stage: int, rank: int, names: dict[nn.Parameter, str], state: SharedState) -> None:
    """Restores what `state_tensors` returned, on any number of ranks. Collective.

    Raises KeyError for another model's, before anything changes; ValueError on all ranks if a number is not finite.
    """
    state.check_sizes({name: getattr(p, "ds_numel", p.numel()) for p, name in names.items()})
    inner = optimizer.optimizer if zero_stage else optimizer
    masters = stepped(optimizer, zero_stage)
    with _rewriting(optimizer, zero_stage):
        for master in masters:
            inner.state.pop(master, None)
            if state.moments:
                inner.state[master] = {kind: torch.zeros_like(master) for kind in state.moments}
                # DeepSpeed's CPU Adam counts steps in an int, PyTorch's in a tensor per weight.
                tensor = isinstance(inner, torch.optim.AdamW)
                steps = torch.tensor(float(state.step), device=master.device) if tensor else state.step
                inner.state[master]["step"] = steps
        sound = []
        for piece in pieces(optimizer, zero_stage, rank, names):
            master = masters[piece.master]
            for kind, held in {"weight": master, **{kind: inner.state[master][kind] for kind in state.moments}}.items():
                part = held.view(-1)[piece.offset : piece.offset + piece.length]
                state.read(kind, piece.name, piece.start, part)
                if len(part):
                    sound.append(_is_sound(kind, *part.aminmax()))
    if not all(distributed.gather_objects(all(map(bool, sound)))):
        raise ValueError("it has weights or moments that are not finite, or a negative exp_avg_sq")


def _is_sound(kind: str, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return low.isfinite() & high.isfinite() & ((low >= 0) | (kind != "exp_avg_sq"))


@torch.no_grad()
def scale_weight(
    optimizer, zero_stage: int, rank: int, names: dict[nn.Parameter, str], name: str, factor: float
) -> None:
    """Multiplies the parameter `name` by `factor`, in float32 and where the forward reads it. Collective."""
    with _rewriting(optimizer, zero_stage):
        for piece in pieces(optimizer, zero_stage, rank, names):
            if piece.name == name:
                master = stepped(optimizer, zero_stage)[piece.master]
                master.view(-1)[piece.offset : piece.offset + piece.length] *= factor


@contextlib.contextmanager
def _rewriting(optimizer, zero_stage: int) -> Iterator[None]:
    """Context in which the float32 weights may change; afterwards the forward's weights are copied from them."""
    if zero_stage == 3:
        optimizer.checkpoint_event_prologue()  # frees gathered weights until the epilogue
    yield
    if zero_stage == 3:
        for i in range(len(stepped(optimizer, zero_stage))):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer.checkpoint_event_epilogue()  # gathers the small parameters that every rank keeps whole
    elif zero_stage:
        optimizer.update_lp_params()


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have the same weights, bit for bit; of those that are split, this rank compares its part."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b.to(a.device)) for a, b in itertools.starmap(_held_of_both, pairs))


def _held_of_both(first: nn.Parameter, second: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both tensors; if one is split by ZeRO-3, the elements of both that this rank holds of it, flat."""
    share = next((p.ds_tensor.ds_numel for p in (first, second) if hasattr(p, "ds_tensor")), None)
    if share is None:
        return first, second
    start = distributed.rank() * share

    def held(parameter: nn.Parameter) -> torch.Tensor:
        if hasattr(parameter, "ds_tensor"):
            return parameter.ds_tensor[: max(0, parameter.ds_numel - start)]  # the rest is padding
        return parameter.detach().flatten()[start : start + share]

    return held(first), held(second)
