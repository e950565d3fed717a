"""Forward of one new token per slot through a decoder of LLaMA's kind: matrix products and little else.

In decoding, small operations around the matrix products take most of the time. A layer of transformers runs about
fifty, each a kernel launch; a layer here about twenty, or sixteen with the kernels of ragged_attention.py.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import rms_norm

from ppo.decoding.attention import attend_groups, can_group
from ppo.decoding.kv_cache import SlotCache
from utils.models.padding_free import is_like_llama


def can_run_llama_step(config) -> bool:
    """Returns whether `new_token_states` supports decoders with this config, if ZeRO-3 does not split their weights."""
    return can_group(config) and is_like_llama(config)


def can_run_triton(decoder: nn.Module) -> bool:
    """Returns whether the kernels of ragged_attention.py support this decoder: on a GPU from Ampere on, with Triton."""
    device = next(decoder.parameters()).device
    if device.type != "cuda" or not can_run_llama_step(decoder.config) or importlib.util.find_spec("triton") is None:
        return False
    from ppo.decoding.ragged_attention import SIZES

    return torch.cuda.get_device_capability(device) >= (8, 0) and decoder.layers[0].self_attn.head_dim in SIZES


def new_token_states(
    decoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: SlotCache
) -> torch.Tensor:
    """Returns the decoder's last states of one new token per slot, [slots, hidden], and adds the token to the cache.

    ids, positions: [slots, 1]. mask: bool [slots, columns], or None: the kernels of ragged_attention.py then attend to
    the columns from `cache.first` to `cache.newest`.
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
    """Returns a function of (attention module, query, key, value), all [slots, heads, size], with PyTorch's kernel."""
    sin = sin[..., : sin.shape[-1] // 2]
    # PyTorch's kernel would convert a bool mask to this in every layer.
    mask = torch.zeros_like(mask, dtype=cos.dtype).masked_fill_(~mask, -torch.inf)[:, None, None]

    def attended(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads = query.shape[1], key.shape[1]
        query, key = _rotated(torch.cat((query, key), 1), cos, sin).split(heads, 1)
        keys, values = cache.update(key[:, :, None], value[:, :, None], attention.layer_idx)
        return attend_groups(query, keys, values, mask, attention.scaling)

    return attended


def _by_kernels(cache: SlotCache, cos: torch.Tensor, sin: torch.Tensor) -> Callable:
    """Returns what `_by_pytorch` returns, with the kernels of ragged_attention.py."""
    from ppo.decoding.ragged_attention import append_rotated, attend

    def attended(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        layer = cache.layers[attention.layer_idx]
        query = append_rotated(query, key, value, cos, sin, layer.keys, layer.values, cache.newest)
        return attend(query, layer.keys, layer.values, cache.first, cache.newest, attention.scaling)

    return attended


def _normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies rotary positions (Su et al. 2021, eq. 34).

    x: [slots, heads, size]; cos: [slots, 1, size]; sin: [slots, 1, size / 2].
    """
    first, second = x.chunk(2, -1)
    rotated = x * cos
    low, high = rotated.chunk(2, -1)
    low.addcmul_(second, sin, value=-1)
    high.addcmul_(first, sin)
    return rotated
