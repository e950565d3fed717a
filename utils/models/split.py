"""Loads models whose weights ZeRO-3 splits over the ranks while they are read, before an engine exists.

utils/engine/split.py makes the function that splits, a `Split`. A split parameter has no elements outside of the
contexts here; `ds_shape` is its whole shape, and `ds_tensor` this rank's part, flat, padded on the last rank.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from utils.distributed import gather_objects, rank
from utils.models.compile import layers_of

Split = Callable[[list[nn.Parameter]], None]  # replaces the parameters' data by this rank's parts. Collective


def is_split(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 splits this parameter over the ranks."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Returns the shape of a parameter, split or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def own_part(parameter: nn.Parameter) -> torch.Tensor:
    """Returns the elements that this rank holds: all, or of a split parameter its part without padding."""
    if not is_split(parameter):
        return parameter
    share = parameter.ds_tensor.ds_numel
    return parameter.ds_tensor[: max(0, parameter.ds_numel - rank() * share)]


@contextlib.contextmanager
def splitting_layers(split: Split | None, outline: PreTrainedModel) -> Iterator[None]:
    """Context in which transformers loads a model tensor by tensor, and each is split at once.

    Vectors, embedding, head and what is tied stay whole in host memory until `split_rest`: transformers compares them,
    and an embedding may grow. They are known by their shapes in `outline`, the model on the meta device. Without
    `split` the context does nothing.
    """
    if split is None:
        yield
        return
    tables = (outline.get_input_embeddings(), outline.get_output_embeddings())
    tied = [outline.get_parameter_or_buffer(name) for pair in outline.all_tied_weights_keys.items() for name in pair]
    parts: list[nn.Parameter] = []
    kept = {x.shape for x in (*tied, *(table.weight for table in tables if table is not None))}

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # transformers marks what it has read; the rest is on the meta device or missing in the files.
        read = getattr(parameter, "_is_hf_initialized", False) and not is_split(parameter)
        if read and parameter.dim() > 1 and parameter.shape not in kept:
            split([parameter])
            parts.append(parameter)
            parameter.data = parameter.data.new_zeros(1).expand(parameter.ds_shape)  # some models ask for the shape

    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # transformers' threads read all tensors as fast as they can
    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()
        for parameter in parts:
            parameter.data = parameter.data.new_empty(0)


def split_rest(model: nn.Module, split: Split | None, device: torch.device) -> None:
    """Splits what `splitting_layers` has left whole, and moves the buffers to the device. Collective."""
    if split is not None:
        split([parameter for parameter in model.parameters() if not is_split(parameter)])
    model.to(device)


def not_finite(model: nn.Module) -> str | None:
    """Returns the name of a parameter that is not finite, None without one. Of a split model, collective."""
    bad = (name for name, x in model.named_parameters() if not bool(torch.isfinite(own_part(x)).all()))
    found = next(bad, None)
    if any(map(is_split, model.parameters())):
        found = next(filter(None, gather_objects(found)), None)
    return found


@contextlib.contextmanager
def gathered(model: PreTrainedModel, by_layer: bool = True) -> Iterator[None]:
    """Context in which forwards of a split model work without an engine. For a model that is not split, does nothing.

    by_layer: each layer is whole only while it runs, and forwards are collective. What is not in a layer is whole all
    the time.
    """
    inside = [module for layer in layers_of(model) for module in layer.modules() if by_layer]
    in_layers = {id(x) for module in inside for x in module.parameters(recurse=False)}
    others = [x for x in model.parameters() if id(x) not in in_layers]
    hooks, running = [], []
    # Of the modules inside of a layer too: some callers run parts of a layer.
    for module in inside if any(map(is_split, model.parameters())) else []:
        hooks.append(module.register_forward_pre_hook(lambda part, _: running.append(_gather(part.parameters()))))
        hooks.append(module.register_forward_hook(lambda *_: _release(running.pop()), always_call=True))
    held = _gather(others)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _release([x for part in (held, *running) for x in part])


def _gather(parameters: Iterator[nn.Parameter]) -> list[nn.Parameter]:
    """Gathers the parameters that are not whole, and returns them."""
    missing = [x for x in parameters if is_split(x) and x.numel() != x.ds_numel]
    if missing:
        missing[0].all_gather(param_list=missing)
    return missing


def _release(parameters: list[nn.Parameter]) -> None:
    if parameters:
        parameters[0].partition(param_list=parameters)


def model_copy(model: nn.Module, split: Split | None) -> nn.Module:
    """Returns a copy of a model; with `split`, one whose weights are split, made tensor by tensor. Collective then."""
    if split is None:
        return copy.deepcopy(model)
    copies = {}
    for parameter in model.parameters():
        held = _gather([parameter])
        copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        _release(held)
        split([copies[id(parameter)]])
    return copy.deepcopy(model, copies)
