"""Decoder states of right-padded rows, without running the padding where attention can be kept apart.

Then the rows go in end to end, as one, each with positions of its own. Flash attention is told where each of them ends.
On a CPU the attention of every row is a call of its own: torch's kernel takes rows of one length only, while the matrix
products around it are the faster the more tokens they get at once.
"""

from functools import partial

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.generic import is_flash_attention_requested

from utils.models.varlen import attend, takes_varlen
from utils.tensors import last_index, to_device

FULL_ATTENTION = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # nothing but attention mixes tokens; layers as `_last_layer` and ppo/decoding/llama_step.py have
FLOAT_TOKENS = 512  # rows up to here are attended in float32 on a CPU: half the time backwards, the same forwards


def decoder_of(lm: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal LM before its head. transformers' `get_decoder` gives the head or the whole for a few."""
    parts = (lm.get_decoder(), lm.base_model, *lm.children())
    return next((part for part in parts if isinstance(part, PreTrainedModel) and part is not lm), lm)


def joins_rows(decoder: nn.Module) -> bool:
    """Whether `states_of` leaves out the padding of this decoder's rows."""
    on_cpu = next(decoder.parameters()).device.type == "cpu" and decoder.config._attn_implementation == "sdpa"
    return has_varlen_kernel(decoder) or (on_cpu and _may_join(decoder))


def has_varlen_kernel(decoder: nn.Module) -> bool:
    """Whether rows are joined and one call attends to them all: flash_attention_2, or PyTorch's own on a GPU in bf16.

    SFT then packs nothing, and the language-model loss of reward models has no padding either.
    """
    if not _may_join(decoder):
        return False
    if is_flash_attention_requested(decoder.config):
        return True
    weight, size = next(decoder.parameters()), decoder.layers[0].self_attn.head_dim
    return decoder.config._attn_implementation == "sdpa" and takes_varlen(weight.device, weight.dtype, size)


def _may_join(decoder: nn.Module) -> bool:
    return is_like_llama(decoder.config) and not getattr(
        decoder, "keeps_padding", False
    )  # utils/models/check.py sets it


def is_like_llama(config) -> bool:
    """Whether decoders with this config are of LLaMA's kind, and each token attends to all that came before."""
    whole_past = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [])
    return config.model_type in FULL_ATTENTION and whole_past and not getattr(config, "sliding_window", None)


def states_of(decoder: nn.Module, sequences: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """The last hidden states at the positions `read`: [n, hidden], row after row.

    sequences: ids [batch, length], right-padded; read: bool, the same shape, False at padding. Where rows are joined,
    what stands behind the last position read of a row is not run either, nor is the last layer behind its attention for
    positions that are not read: of 8 layers that is 8 % of the work on a prompt, of 32 layers 2 %.
    """
    # Right padding needs no attention mask: causality hides it, and attention kernels are fastest so.
    if not joins_rows(decoder):
        return decoder(input_ids=sequences, use_cache=False).last_hidden_state[read]
    device, width = sequences.device, sequences.shape[1]
    read = read.cpu()  # the only wait for a GPU in this forward, before its first layer
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
    """Tells flash attention where joined rows end, by transformers' arguments; otherwise each layer would look it up.

    lengths: on the CPU, so that the longest is known without waiting for the device.
    """
    ends = to_device(pad(lengths.cumsum(0), (1, 0)).int(), device)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _last_layer(layer: nn.Module, hidden: torch.Tensor, read: torch.Tensor, options: dict) -> torch.Tensor:
    """A decoder layer's output where it is read: what follows its attention need not know of any other token."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)
    states = (hidden + attended)[0, read]
    return states + layer.mlp(layer.post_attention_layernorm(states))


def _attention_by_rows(module: nn.Module, query, key, value, attention_mask, **options):
    """transformers' sdpa attention, but for joined rows: they have `row_ends`, or a mask of integers, their lengths."""
    if "cu_seq_lens_q" in options:
        assert not options.get("dropout"), "the kernel has no dropout"
        ends, longest = options["cu_seq_lens_q"], options["max_length_q"]
        return attend(query, key, value, ends, longest, options.get("scaling")), None
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _each_row(query, key, value, attention_mask, options.get("dropout", 0.0), options.get("scaling")), None


@torch.compiler.disable  # the lengths are the host's: a compiled layer would be compiled again for each set of them
def _each_row(query, key, value, attention_mask, *options) -> torch.Tensor:
    lengths = attention_mask.flatten().tolist()
    if len(set(lengths)) == 1:  # one call: more heads for the cores to share
        query, key, value = (x[0].unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (query, key, value))
        return _attention(query, key, value, *options).flatten(0, 1)[None]
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([_attention(*part, *options) for part in parts], dim=1)


def _attention(query, key, value, dropout: float, scaling: float | None) -> torch.Tensor:
    """Of whole rows, causal: [rows, heads, length, size] each -> [rows, length, heads, size]."""
    dtype = query.dtype
    if query.shape[2] <= FLOAT_TOKENS:  # in scoring too, or the ratio would not begin at 1
        query, key, value = (x.float() for x in (query, key, value))
    shared = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=shared
    )
    return output.to(dtype).transpose(1, 2)


AttentionInterface.register("sdpa", _attention_by_rows)
