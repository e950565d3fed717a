"""Attention of one new token: no copy of the cache for each query head, and no reading of what is masked.

transformers repeats keys and values once a query head whenever there is a mask: with three heads a group that writes
and reads three caches a token. A group's heads are instead rows of one product with the keys they share. And where
every slot may be a call of its own (`alone_from`), it reads its own columns instead of the longest slot's.
"""

import contextlib

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from utils.models.load import attention_cap
from utils.models.padding_free import joins_rows

ALONE_ELEMENTS = 32_000  # of the longest slot's keys: with fewer, one masked call for all slots is faster in float32
NAME = "sdpa-grouped"  # no identifier, so that --attn_implementation does not offer it


def grouped_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As `sdpa_attention_forward`: query [batch, heads, tokens, size], key and value [batch, key-value heads, ...].

    What it does differently it does for one token, a mask that is the same for all heads, and nothing unusual. A mask
    of integers says how many of the last columns each slot holds (`alone_from`).
    """
    heads, tokens = query.shape[1:3]
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return by_slots(query, key, value, attention_mask.flatten().tolist(), scaling), None
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    unusual = any(kwargs.get(name) is not None for name in ("position_bias", "cache"))
    if tokens > 1 or heads == key.shape[1] or not one_mask or unusual:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return by_groups(query, key, value, attention_mask, scaling, dropout), None


def by_groups(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask, scaling, dropout=0.0) -> torch.Tensor:
    """One token a slot; heads that share keys are rows of one product. Shapes as in `by_slots`; mask: as sdpa's."""
    groups = query.reshape(len(key), key.shape[1], -1, key.shape[3])
    output = scaled_dot_product_attention(groups, key, value, mask, dropout, scale=scaling)
    return output.reshape(len(key), 1, query.shape[1], -1)


def by_slots(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling) -> torch.Tensor:
    """One token a slot, each over the last `lengths[i]` columns. query: [slots, heads, (1,) size]; keys and values

    [slots, key-value heads, columns, size] -> [slots, 1, heads, size].

    In float32: torch's CPU kernel is three times as fast with it as with bf16, for a single token.
    """
    groups = query.float().reshape(len(lengths), key.shape[1], -1, query.shape[-1])
    outputs, columns = [], key.shape[2]
    for length, own, keys, values in zip(lengths, *(x.split(1) for x in (groups, key, value)), strict=True):
        held = (x.narrow(2, columns - length, length).float() for x in (keys, values))
        outputs.append(scaled_dot_product_attention(own, *held, scale=scaling))
    return torch.cat(outputs).to(query.dtype).reshape(len(lengths), 1, query.shape[1], -1)


def alone_from(decoder: nn.Module) -> int | None:
    """From how many columns on each slot shall be an attention call of its own; None: never.

    On a CPU that pays when there is much to read, unless heads share keys (one product for all of them is faster then);
    in bf16 always, as `by_slots` goes through float32. On a GPU it would be a launch for each slot.
    """
    config = decoder.config
    on_cpu = next(decoder.parameters()).device.type == "cpu"
    if not on_cpu or not joins_rows(decoder) or config.num_key_value_heads != config.num_attention_heads:
        return None
    keys = decoder.layers[0].self_attn.k_proj
    return ALONE_ELEMENTS // keys.out_features if keys.weight.dtype == torch.float32 else 0


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def is_replaced(config) -> bool:
    """Whether decoding leaves this config's attention for ours: PyTorch's own (sdpa), or flash attention.

    transformers has the latter take the slots' padding out of the cache for each new token, a copy of it in every
    layer, and waits for the GPU to know how much that is.
    """
    if attention_cap(config):
        return False  # PyTorch's own has no such cap
    return config._attn_implementation == "sdpa" or is_flash_attention_requested(config)


@contextlib.contextmanager
def grouped(config):
    """Inside, a model with this config uses the above, where it `is_replaced`."""
    config = config.get_text_config()
    before = config._attn_implementation
    if is_replaced(config):
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
