"""Moves what only an optimizer step needs to host memory, while something else needs the GPU's.

DeepSpeed's `offload_states` does not fit: under ZeRO-3 it refuses PyTorch's AdamW, and under ZeRO-1 and 2 it cuts the
links between weights and their float32 copies. Here storages are emptied and filled again, so that no view changes.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from utils.device import device, on_gpu
from utils.engine.memory import host_copies
from utils.engine.state import stepped


def step_tensors(optimizer, zero_stage: int, parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """Returns what a forward does not need, each storage as one flat tensor of bytes on the device.

    These are Adam's moments, float32 weights, and ZeRO-3's gradients. parameters: the model's, which are left out:
    without ZeRO, the optimizer steps them themselves.
    """
    inner = optimizer.optimizer if zero_stage else optimizer
    held = [*stepped(optimizer, zero_stage), *itertools.chain.from_iterable(x.values() for x in inner.state.values())]
    if zero_stage == 3:
        held.append(optimizer.grad_partitions_flat_buffer)
    held = [x.untyped_storage() for x in held if isinstance(x, torch.Tensor) and x.dim()]
    storages = {x._cdata: x for x in held}
    for parameter in parameters:
        storages.pop(getattr(parameter, "ds_tensor", parameter).untyped_storage()._cdata, None)
    here = [x for x in storages.values() if x.device.type == device().type]  # --offload_optimizer has them elsewhere
    return [torch.empty(0, dtype=torch.uint8, device=x.device).set_(x) for x in here]


@contextlib.contextmanager
def emptied(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Context in which these tensors, and all views of them, take no memory of the device. Then they are as before."""
    copies = host_copies(tensors)  # PyTorch keeps page-locked memory for the next time
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
    if on_gpu():
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.untyped_storage().resize_(copy.nbytes)
            tensor.copy_(copy)
