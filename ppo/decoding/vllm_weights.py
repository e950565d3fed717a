"""Reads back the weights that vLLM computes with, and compares them with the policy's."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Part:
    """Where vLLM holds a tensor of the policy: `size` rows from `start` of a module's weight or bias; None: all."""

    module: nn.Module
    name: str  # weight, bias
    start: int = 0
    size: int | None = None
    dim: int | None = None  # along which the tensor is split over tensor-parallel ranks; None: not split
    index: int = 0  # of this rank's share
    is_vocabulary: bool = False

    def cut(self, held: torch.Tensor, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what corresponds in a module's whole weight or bias and in the policy's whole tensor."""
        if self.size is not None:
            held = held.narrow(0, self.start, self.size)
        if self.dim is None:
            return held, tensor
        length = held.shape[self.dim]
        tensor = tensor[(slice(None),) * self.dim + (slice(self.index * length, (self.index + 1) * length),)]
        if self.is_vocabulary:  # the last share of a vocabulary has padding
            held = held.narrow(self.dim, 0, tensor.shape[self.dim])
        return held, tensor


@torch.no_grad()
def first_difference(parts: dict[str, Part], weights: Iterator[tuple[str, torch.Tensor]]) -> tuple[str, float] | None:
    """Returns the name and the largest difference of the first tensor that differs from vLLM's, None if none does.

    parts: by name. weights: all of the model. Infinite: not finite in one of them, of another shape, or in one of the
    two models only.
    """
    missing, module, held = dict.fromkeys(parts), None, {}
    for name, tensor in weights:
        part = parts.get(name)
        if part is None:
            return name, float("inf")
        del missing[name]
        if part.module is not module:
            module, held = part.module, {}
        if part.name not in held:
            held[part.name] = list(_held(part.module, part.name))
        gaps = [difference(*part.cut(x, tensor)) for x in held[part.name]]
        if any(gaps):
            return name, max(gaps)
    for name in missing:
        return name, float("inf")
    return None


def _held(module: nn.Module, name: str) -> Iterator[torch.Tensor]:
    """Yields the weight or bias that a module of vLLM's computes with, in each form in which it has one.

    On a CPU vLLM packs matrices; an embedding without a separate head has both forms. A product with the identity
    matrix gives what is packed exactly, as all but one of the terms of each sum are 0.
    """
    is_packed, held = name == "weight" and hasattr(module, "cpu_linear"), getattr(module, name)
    if held.numel():
        yield held
    if is_packed:
        size = getattr(module, "input_size_per_partition", module.input_size)
        yield module.quant_method.apply(module, torch.eye(size, dtype=held.dtype)).T


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns the largest difference of two tensors; infinite if they have other shapes, or are not finite."""
    if x.shape != y.shape:
        return float("inf")
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if torch.equal(x, y):
        return 0.0
    gap = float((x - y).abs().max())
    return max(gap, math.ulp(0.0)) if math.isfinite(gap) else float("inf")
