"""Predicts the peak memory of forward and backward passes from shapes, on the meta device."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface

ATTENTION = "shapes-only"  # not an identifier, so that --attn_implementation does not offer it


class _FlashShapes(torch.autograd.Function):
    """Saves what a flash attention kernel saves for its backward pass: inputs, output, one number per row."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _attention(module, query, key, value, attention_mask, **_):
    return _FlashShapes.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)


class LiveBytes(TorchDispatchMode):
    """Context that counts every storage from its creation until it is freed. `peak`: largest number of bytes."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}  # a weak reference keeps the address unique

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in _storages([args, kwargs]):
            self._count(storage, 0)  # a new one was created outside of the context
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._count(storage, storage.nbytes())
        if self.live > self.peak:
            self._forget_freed()
            self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self._known:
            self._known[storage._cdata] = (StorageWeakRef(storage), size)
            self.live += size

    def _forget_freed(self) -> None:
        for key in [key for key, (reference, _) in self._known.items() if reference.expired()]:
            self.live -= self._known.pop(key)[1]


def _storages(values) -> Iterable[torch.UntypedStorage]:
    return (x.untyped_storage() for x in tree_iter(values) if isinstance(x, torch.Tensor))


@cache
def peak_bytes(decoder: nn.Module, batch: int, length: int, backward: bool) -> int:
    """Returns the peak bytes, without weights and gradients, of a pass of [batch, length] tokens through a decoder.

    decoder: on the meta device, created with attn_implementation=ATTENTION, without head.
    """
    ids = torch.empty(batch, length, dtype=torch.int64, device="meta")
    hooks = []
    if backward:
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in decoder.parameters() if p.requires_grad]
    with torch.set_grad_enabled(backward), LiveBytes() as counter:
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        if backward:
            hidden.backward(torch.empty_like(hidden))
    for hook in hooks:
        hook.remove()
    return counter.peak


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None
