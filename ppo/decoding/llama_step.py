"""One new token a slot through a decoder of LLaMA's kind: the products, and little else.

In decoding, the small operations around the matrix products decide the time. transformers runs about fifty per layer,
each a kernel launch on a GPU, besides masks and wrappers. Here a layer runs about twenty (sixteen with the kernels of
ragged_attention.py), with the same numbers but for rounding. Other architectures, windows and attention kernels,
and weights that ZeRO-3 leaves split, go through the model's own forward.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import rms_norm

from ppo.decoding.attention import by_groups, by_slots, is_replaced
from ppo.decoding.kv_cache import SlotCache
from utils.models.padding_free import is_like_llama


def goes_straight(config) -> bool:
    """Whether `new_token_states` knows decoders with this config. Their weights have to be whole besides."""
    return is_replaced(config) and is_like_llama(config)


def goes_ragged(decoder: nn.Module) -> bool:
    """Whether the kernels of ragged_attention.py can run this decoder: on a GPU from Ampere on, with Triton."""
    place = next(decoder.parameters()).device
    if place.type != "cuda" or not goes_straight(decoder.config) or importlib.util.find_spec("triton") is None:
        return False
    from ppo.decoding.ragged_attention import SIZES

    return torch.cuda.get_device_capability(place) >= (8, 0) and decoder.layers[0].self_attn.head_dim in SIZES


def new_token_states(
    decoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: SlotCache
) -> torch.Tensor:
    """The decoder's states of one new token a slot, which joins the cache: [slots, hidden].

    ids, positions: [slots, 1]. mask: bool [slots, columns], or int64 [1, 1, 1, slots], the columns of each slot. None:
    the kernels of ppo/decoding/ragged_attention.py attend to the columns from `cache.first` to `cache.newest`.
    """
    hidden = decoder.embed_tokens(ids.squeeze(1))
    angles = decoder.rotary_emb(hidden, positions)
    attended = _by_kernels(cache, *angles) if mask is None else _by_pytorch(cache, *angles, mask)
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        x = _normed(layer.input_layernorm, hidden)
        query, key, value = (
            project(x).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):  # Qwen3
            query, key = _normed(attention.q_norm, query), _normed(attention.k_norm, key)
        hidden = hidden + attention.o_proj(attended(attention, query, key, value).flatten(1))
        x = _normed(layer.post_attention_layernorm, hidden)
        hidden = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).mul_(mlp.up_proj(x)))
    return _normed(decoder.norm, hidden)


def _by_pytorch(cache: SlotCache, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> Callable:
    """Returns a function that gives a layer's attention: [slots, heads, size].

    It takes the layer's attention module, and query, key and value, [slots, heads, size] each, before rotation.
    """
    sin = sin[..., : sin.shape[-1] // 2]
    if mask.dtype == torch.int64:
        attend, seen = by_slots, mask.flatten().tolist()
    else:  # sdpa would make numbers of it in every layer
        mask = torch.zeros_like(mask, dtype=cos.dtype).masked_fill_(~mask, -torch.inf)
        attend, seen = by_groups, mask[:, None, None]

    def attended(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads = query.shape[1], key.shape[1]
        query, key = _rotated(torch.cat((query, key), 1), cos, sin).split(heads, 1)
        keys, values = cache.update(key[:, :, None], value[:, :, None], attention.layer_idx)
        return attend(query, keys, values, seen, attention.scaling)

    return attended


def _by_kernels(cache: SlotCache, cos: torch.Tensor, sin: torch.Tensor) -> Callable:
    """As `_by_pytorch`, with the kernels of ppo/decoding/ragged_attention.py."""
    from ppo.decoding.ragged_attention import append_rotated, attend

    def attended(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        layer = cache.layers[attention.layer_idx]
        query = append_rotated(query, key, value, cos, sin, layer.keys, layer.values, cache.newest)
        return attend(query, layer.keys, layer.values, cache.first, cache.newest, attention.scaling)

    return attended


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
