"""torch.compile of a decoder, a layer at a time: the graph of one layer serves all, and any number of tokens."""

import contextlib

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that transformers makes its decoders of."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: nn.Module) -> None:
    """Has each layer compiled at its first call; with gradient checkpointing it is run again as compiled.

    A copy.deepcopy of the model is not compiled.
    """
    for layer in layers_of(model):
        layer.compile(dynamic=True)


@contextlib.contextmanager
def eager(model: nn.Module):
    """Inside, compiled layers run as they were written: decoding has other shapes, with a cache that differs a step."""
    if all(layer._compiled_call_impl is None for layer in layers_of(model)):
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield
