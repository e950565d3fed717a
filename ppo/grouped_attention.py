"""Attention of one new token where several query heads share a key-value head: no copy of the cache for each of them.

transformers repeats keys and values once a query head whenever there is a mask: with three heads a group that writes
and reads three caches a token. A group's heads are instead rows of one product with the keys they share.
"""

import contextlib

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa-grouped"  # no identifier, so that --attn_implementation does not offer it


def grouped_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As `sdpa_attention_forward`: query [batch, heads, tokens, size], key and value [batch, key-value heads, ...].

    What it does differently it does for one token, a mask that is the same for all heads, and nothing unusual.
    """
    batch, heads, tokens, size = query.shape
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    unusual = any(kwargs.get(name) is not None for name in ("position_bias", "cache"))
    if tokens > 1 or heads == key.shape[1] or not one_mask or unusual:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    groups = query.reshape(batch, key.shape[1], -1, size)
    output = scaled_dot_product_attention(groups, key, value, attention_mask, dropout, scale=scaling)
    return output.reshape(batch, 1, heads, -1), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def grouped(config):
    """Inside, a model with this config whose attention is PyTorch's own (sdpa) uses the above."""
    config = config.get_text_config()
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
