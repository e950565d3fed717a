"""Forward of a linear layer with LoRA adapters in the dtype of its frozen weights."""

from collections.abc import Iterable

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.nn.functional import linear


class AdapterLinear(Linear):
    """peft's layer, with another forward for plain LoRA.

    peft computes in the adapter's dtype. With float32 adapters on bf16 weights that converts inputs and outputs to
    float32, and keeps a float32 input for the backward pass of each layer. Here the adapter, which is small, is rounded
    to the dtype of the inputs in each forward, and added to the output by one kernel; gradients add up in float32.
    The name of this class must contain "Linear": by it peft's all-linear finds layers that already have an adapter.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Returns the layer's output with its active adapters, [..., out], in the dtype of x, [..., in]."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or args or kwargs or self.lora_variant.keys() & names:
            return super().forward(x, *args, **kwargs)
        output = self.base_layer(x)
        result = output.flatten(0, -2)
        for name in names:
            down, up = (part[name].weight.to(x.dtype) for part in (self.lora_A, self.lora_B))
            inner = linear(self.lora_dropout[name](x), down).flatten(0, -2)
            result = torch.addmm(result, inner, up.t(), alpha=self.scaling[name])
        return result.view_as(output)


def use_base_dtype(layers: Iterable[nn.Module]) -> None:
    """Gives peft's linear layers the forward of `AdapterLinear`. Layers of other classes stay as they are."""
    for layer in layers:
        if type(layer) is Linear:
            layer.__class__ = AdapterLinear
