"""Decoder states of right-padded rows, computed without padding if the attention kernel supports it.

Rows are joined end to end, each with its own positions. Flash attention gets the row boundaries. On a CPU, attention
runs once per row, because torch's kernel takes rows of one length; all other layers process all tokens at once.
"""

from functools import partial

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from utils.models.varlen import attend, takes_varlen
from utils.tensors import last_index, to_device

# Only attention mixes tokens; layers have the structure of `_last_layer` and ppo/decoding/llama_step.py.
FULL_ATTENTION = ("llama", "mistral", "qwen2", "qwen3")
SDPA_JOINED = "sdpa-joined"  # not an identifier, so that --attn_implementation does not offer it
FLOAT_TOKENS = 512  # longest row whose attention runs in float32 on a CPU: halves the backward time


def decoder_of(lm: PreTrainedModel) -> PreTrainedModel:
    """Returns the part of a causal LM before its head; `get_decoder` returns something else for some models."""
    parts = (lm.get_decoder(), lm.base_model, *lm.children())
    return next((part for part in parts if isinstance(part, PreTrainedModel) and part is not lm), lm)


def joins_rows(decoder: nn.Module) -> bool:
    """Whether `states_of` skips the padding of this decoder's rows."""
    on_cpu = next(decoder.parameters()).device.type == "cpu" and uses_sdpa(decoder.config)
    return has_varlen_kernel(decoder) or (on_cpu and _may_join(decoder))


def has_varlen_kernel(decoder: nn.Module) -> bool:
    """Whether one kernel call attends to all joined rows: flash_attention_2, or PyTorch's own on a GPU in bf16."""
    if not _may_join(decoder):
        return False
    if is_flash_attention_requested(decoder.config):
        return True
    weight, size = next(decoder.parameters()), decoder.layers[0].self_attn.head_dim
    return uses_sdpa(decoder.config) and takes_varlen(weight.device, weight.dtype, size)


def uses_sdpa(config) -> bool:
    """Returns whether attention is PyTorch's own kernel: transformers' sdpa, or `_attention_by_rows` in its place."""
    return config._attn_implementation in ("sdpa", SDPA_JOINED)


def _may_join(decoder: nn.Module) -> bool:
    keeps_padding = getattr(decoder, "keeps_padding", False)  # set by utils/models/check.py
    return is_like_llama(decoder.config) and not keeps_padding


def is_like_llama(config) -> bool:
    """Whether decoders with this config have LLaMA's structure, and full causal attention in all layers."""
    whole_past = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [])
    return config.model_type in FULL_ATTENTION and whole_past and not getattr(config, "sliding_window", None)


def states_of(decoder: nn.Module, sequences: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """Returns the last hidden states at the positions `read`: [n, hidden], row by row.

    sequences: ids [batch, length], right-padded; read: bool, same shape, False at padding. If rows are joined, it also
    skips positions after the last one read, and the last layer's MLP for positions that are not read.
    """
    # Right padding needs no mask with causal attention, and kernels are fastest without one.
    if not joins_rows(decoder):
        return decoder(input_ids=sequences, use_cache=False).last_hidden_state[read]
    if uses_sdpa(decoder.config):  # and keeps it: layers that are checkpointed call it in the backward pass too
        decoder.config._attn_implementation = SDPA_JOINED
    device, width = sequences.device, sequences.shape[1]
    read = read.cpu()  # the only GPU synchronisation of this forward
    lengths = last_index(read) + 1
    inside = torch.arange(width) < lengths[:, None]
    places, found = inside.flatten().nonzero().squeeze(1), read[inside].nonzero().squeeze(1)
    positions = (places % width)[None]
    places, positions, found = (to_device(x, device) for x in (places, positions, found))
    hidden = decoder.embed_tokens(sequences.flatten()[places][None])
    options = {"position_ids": positions, "position_embeddings": decoder.rotary_emb(hidden, positions)}
    if has_varlen_kernel(decoder):
        options |= {"attention_mask": None} | row_ends(lengths, device)
    else:
        options["attention_mask"] = lengths.view(1, 1, 1, -1)
    *layers, last = decoder.layers
    for layer in layers:
        hidden = layer(hidden, **options)
    finish = partial(_last_layer, last, read=found, options=options)
    if last.gradient_checkpointing and last.training:
        finish = partial(last._gradient_checkpointing_func, finish)
    return decoder.norm(finish(hidden))


def row_ends(lengths: torch.Tensor, device: torch.device) -> dict:
    """Returns transformers' arguments with the boundaries of joined rows. lengths: on the CPU, to avoid a wait."""
    ends = to_device(pad(lengths.cumsum(0), (1, 0)).int(), device)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _last_layer(layer: nn.Module, hidden: torch.Tensor, read: torch.Tensor, options: dict) -> torch.Tensor:
    """Returns a decoder layer's output at the positions `read`; its MLP runs for these only."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)
    states = (hidden + attended)[0, read]
    return states + layer.mlp(layer.post_attention_layernorm(states))


def _attention_by_rows(module: nn.Module, query, key, value, attention_mask, **options):
    """sdpa attention of transformers, or of joined rows if there are `row_ends`, or lengths in place of the mask."""
    if "cu_seq_lens_q" in options:
        assert not options.get("dropout"), "the kernel has no dropout"
        ends, longest = options["cu_seq_lens_q"], options["max_length_q"]
        return attend(query, key, value, ends, longest, options.get("scaling")), None
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _each_row(query, key, value, attention_mask, options.get("dropout", 0.0), options.get("scaling")), None


@torch.compiler.disable  # a compiled layer would be recompiled for each set of lengths
def _each_row(query, key, value, attention_mask, *options) -> torch.Tensor:
    lengths = attention_mask.flatten().tolist()
    if len(set(lengths)) == 1:  # one call, which uses more cores
        query, key, value = (x[0].unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (query, key, value))
        return _attention(query, key, value, *options).flatten(0, 1)[None]
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([_attention(*part, *options) for part in parts], dim=1)


def _attention(query, key, value, dropout: float, scaling: float | None) -> torch.Tensor:
    """Causal attention of unpadded rows: [rows, heads, length, size] each -> [rows, length, heads, size]."""
    dtype = query.dtype
    if query.shape[2] <= FLOAT_TOKENS:  # in scoring too, so that the first ratio is 1
        query, key, value = (x.float() for x in (query, key, value))
    shared = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=shared
    )
    return output.to(dtype).transpose(1, 2)


AttentionInterface.register(SDPA_JOINED, _attention_by_rows)
AttentionMaskInterface.register(SDPA_JOINED, sdpa_mask)
