"""One new token a slot through a decoder of LLaMA's kind: the products, and little else.

While decoding, what stands around the products decides: transformers makes some fifty small operations a layer, each a
launch on a GPU, and masks and wrappers around the layers. Here there are about twenty, and the same numbers but for
rounding. Other architectures, and weights that ZeRO-3 has split, go through their own forward.
"""

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from ppo.grouped_attention import NAME, by_slots
from ppo.slots import SlotCache
from utils.rows import sees_whole_past


def advances_plainly(decoder: nn.Module) -> bool:
    """Whether `new_token_states` knows this decoder and its weights are whole. Inside `grouped`."""
    if decoder.config._attn_implementation != NAME or not sees_whole_past(decoder.config):
        return False
    return decoder.layers[0].self_attn.q_proj.weight.numel() > 0


def new_token_states(
    decoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: SlotCache
) -> torch.Tensor:
    """The decoder's states of one new token a slot, which joins the cache: [slots, hidden].

    ids, positions: [slots, 1]. mask: bool [slots, columns], or int64 [1, 1, 1, slots], the columns of each slot.
    """
    hidden = decoder.embed_tokens(ids)
    cos, sin = (x.squeeze(1)[:, None] for x in decoder.rotary_emb(hidden, positions))
    sin = sin[..., : sin.shape[-1] // 2]
    hidden = hidden.squeeze(1)
    lengths = mask.flatten().tolist() if mask.dtype == torch.int64 else None
    mask = mask[:, None, None] if lengths is None else None
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        x = _normed(layer.input_layernorm, hidden)
        query, key, value = (
            project(x).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):  # Qwen3
            query, key = _normed(attention.q_norm, query), _normed(attention.k_norm, key)
        heads, groups = query.shape[1], key.shape[1]
        query, key = _rotated(torch.cat((query, key), 1), cos, sin).split((heads, groups), 1)
        keys, values = cache.update(key[:, :, None], value[:, :, None], attention.layer_idx)
        if lengths is None:
            query = query.unflatten(1, (groups, -1))  # a group's heads are rows of one product
            x = scaled_dot_product_attention(query, keys, values, mask, scale=attention.scaling)
        else:
            x = by_slots(query, keys, values, lengths, attention.scaling)
        hidden = hidden + attention.o_proj(x.flatten(1))
        x = _normed(layer.post_attention_layernorm, hidden)
        hidden = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).mul_(mlp.up_proj(x)))
    return _normed(decoder.norm, hidden)


def _normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021, eq. 34). x: [slots, heads, size]; cos: [slots, 1, size]; sin: half of it."""
    first, second = x.chunk(2, -1)
    turned = x * cos
    low, high = turned.chunk(2, -1)
    low.addcmul_(second, sin, value=-1)
    high.addcmul_(first, sin)
    return turned
