"""Attention of one new token per slot, without a copy of the cache for each query head.

With a mask, transformers repeats keys and values once per query head: three query heads per key-value head write and
read the cache three times per token. Here the query heads that share a key-value head are rows of one product.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from utils.models.load import attention_cap
from utils.models.padding_free import uses_sdpa

SDPA_GROUPED = "sdpa-grouped"  # not an identifier, so that --attn_implementation does not offer it


def grouped_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """`sdpa_attention_forward` of transformers, with another kernel for a single token and a mask that all heads share.

    query: [batch, heads, tokens, size]; key and value: [batch, key-value heads, columns, size].
    """
    heads, tokens = query.shape[1:3]
    shared_mask = attention_mask is None or attention_mask.shape[1] == 1
    unusual = any(kwargs.get(name) is not None for name in ("position_bias", "cache"))
    if tokens > 1 or heads == key.shape[1] or not shared_mask or unusual:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return attend_groups(query, key, value, attention_mask, scaling, dropout), None


def attend_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Attention of one token per slot: [slots, 1, heads, size].

    query: [slots, heads, (1,) size]; key and value: [slots, key-value heads, columns, size]; mask: broadcast over
    heads.
    """
    groups = query.reshape(len(key), key.shape[1], -1, key.shape[3])
    output = scaled_dot_product_attention(groups, key, value, mask, dropout, scale=scaling)
    return output.reshape(len(key), 1, query.shape[1], -1)


AttentionInterface.register(SDPA_GROUPED, grouped_attention)
AttentionMaskInterface.register(SDPA_GROUPED, sdpa_mask)


def can_group(config) -> bool:
    """Whether decoding can replace this config's attention (sdpa or flash attention) by `grouped_attention`."""
    if attention_cap(config):
        return False  # PyTorch's attention cannot cap scores
    return uses_sdpa(config) or is_flash_attention_requested(config)


@contextlib.contextmanager
def grouped(config) -> Iterator[None]:
    """Context in which the model that owns this config uses `grouped_attention`, where it `can_group`."""
    config = config.get_text_config()
    before = config._attn_implementation
    if can_group(config):
        config._attn_implementation = SDPA_GROUPED
    try:
        yield
    finally:
        config._attn_implementation = before
