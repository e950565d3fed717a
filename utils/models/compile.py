"""Compiles a decoder layer by layer: one graph serves all layers and any number of tokens."""

import contextlib

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Returns the decoder layers of a transformers model."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: nn.Module) -> None:
    """Compiles each layer at its first call, recomputation included. A copy.deepcopy of the model is not compiled."""
    for layer in layers_of(model):
        layer.compile(dynamic=True)


@contextlib.contextmanager
def eager(model: nn.Module):
    """Context in which compiled layers run uncompiled, for decoding, whose shapes change with every step."""
    if all(layer._compiled_call_impl is None for layer in layers_of(model)):
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield
