"""Where vLLM holds each tensor of the policy, and what it computes with: for an exact comparison with the policy's.

Imported by vllm_engine.py only, which prepares the process for vllm.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


@dataclass(frozen=True)
class Part:
    """Where vLLM holds a tensor of the policy: `size` rows from `start` of a module's weight or bias; None: all."""

    module: nn.Module
    name: str  # weight, bias
    start: int = 0
    size: int | None = None
    dim: int | None = None  # along which the tensor is split over tensor-parallel ranks; None: not split
    index: int = 0  # of this rank's share

    def cut(self, held: torch.Tensor, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what corresponds in a module's whole weight or bias and in the policy's whole tensor."""
        if self.size is not None:
            held = held.narrow(0, self.start, self.size)
        if self.dim is None:
            return held, tensor
        length = held.shape[self.dim]
        tensor = tensor[(slice(None),) * self.dim + (slice(self.index * length, (self.index + 1) * length),)]
        if isinstance(self.module, VocabParallelEmbedding):  # the last share of a vocabulary has padding
            held = held.narrow(self.dim, 0, tensor.shape[self.dim])
        return held, tensor


def parts_of(model: nn.Module) -> Iterator[tuple[str, Part]]:
    """Yields the name that each weight and bias of vLLM's model has in the policy, and where vLLM holds it."""
    packed = getattr(model, "packed_modules_mapping", {})
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        names, shares = [last], [(0, None, getattr(module, "tp_rank", 0))]  # start, size, index
        if isinstance(module, QKVParallelLinear):
            query, key, value = (
                module.num_heads * module.head_size, module.num_kv_heads * module.head_size,
                module.num_kv_heads * module.v_head_size,
            )  # fmt: skip
            copied = module.tp_rank // module.num_kv_head_replicas
            shares = [(0, query, module.tp_rank), (query, key, copied), (query + key, value, copied)]
            names = packed.get(last, names)
        elif isinstance(module, MergedColumnParallelLinear):
            sizes = [size // module.tp_size for size in module.output_sizes]
            shares = [(sum(sizes[:i]), size, module.tp_rank) for i, size in enumerate(sizes)]
            names = packed.get(last, names)
        elif isinstance(module, VocabParallelEmbedding) and module.tp_size == 1:
            shares = [(0, module.org_vocab_size, 0)]  # padding behind it
        if len(names) != len(shares):  # the policy has one tensor for all
            names, shares = [last], [(0, None, 0)]
        is_split = isinstance(module, LinearBase | VocabParallelEmbedding) and module.tp_size > 1
        for name, _ in module.named_parameters(recurse=False):
            dim = 0 if is_split else None
            if isinstance(module, RowParallelLinear) and is_split:
                dim = 1 if name == "weight" else None
            for own, (start, size, index) in zip(names, shares, strict=True):
                yield ".".join(filter(None, (parent, own, name))), Part(module, name, start, size, dim, index)


def forms_of(module: nn.Module, name: str) -> Iterator[torch.Tensor]:
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
