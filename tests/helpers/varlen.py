"""A float64 CPU kernel for PyTorch's variable-length attention, so that code for a GPU runs here up to the kernel."""

from functools import cache

import torch
from torch.nn.attention import varlen

import utils.models.padding_free


def on_cpu(monkeypatch) -> None:
    """For the rest of the test, decoders join rows on the CPU as they do on a GPU in bf16."""
    _register()
    monkeypatch.setattr(utils.models.padding_free, "takes_varlen", lambda device, dtype, head_size: True)


def causal_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float):
    """Softmax attention row by row, by its formula: [tokens, heads, size] each -> (output, logsumexp)."""
    outputs, sums = [], []
    for q, k, v in _by_row(lengths, query, key, value):
        scores = _scores(q, k, scale)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, 1).float()


def _by_row(lengths: list[int], query: torch.Tensor, *others: torch.Tensor):
    """Splits into rows, in float64; repeats keys and values for each query head."""
    heads = query.shape[1]
    parts = (x.double().repeat_interleave(heads // x.shape[1], 1).split(lengths) for x in (query, *others))
    return zip(*parts, strict=True)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    later = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device).triu(1)
    return (torch.einsum("qhd,khd->hqk", query, key) * scale).masked_fill(later, -torch.inf)


def _lengths(ends: torch.Tensor, others: torch.Tensor, longest: int, of_keys: int, window: list[int]) -> list[int]:
    """Checks the arguments, as a GPU kernel would not, and returns the rows' lengths."""
    lengths = ends.diff().tolist()
    assert ends.dtype == torch.int32 and ends[0] == 0 and torch.equal(ends, others)
    assert longest == of_keys == max(lengths) and type(longest) is int and list(window) == [-1, 0]
    return lengths


@cache
def _register() -> None:
    @varlen._varlen_attn.register_kernel("cpu")
    def forward(q, k, v, ends, others, longest, of_keys, is_causal=False, scale=None, window_size=None, *_):
        lengths = _lengths(ends, others, longest, of_keys, window_size)
        output, sums = causal_rows(q, k, v, lengths, scale)
        return output.to(q.dtype), sums, torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(
        gradient, q, k, v, out, sums, ends, others, longest, of_keys, is_causal, state, scale=None, window_size=None
    ):
        found = []
        for d, q_, k_, v_ in _by_row(_lengths(ends, others, longest, of_keys, window_size), gradient, q, k, v):
            weights = _scores(q_, k_, scale).softmax(-1)
            by_weight = torch.einsum("qhd,khd->hqk", d, v_)
            slope = scale * weights * (by_weight - (weights * by_weight).sum(-1, keepdim=True))
            pairs = (("hqk,khd->qhd", slope, k_), ("hqk,qhd->khd", slope, q_), ("hqk,qhd->khd", weights, d))
            found.append([torch.einsum(*pair) for pair in pairs])
        whole = (torch.cat(parts) for parts in zip(*found, strict=True))
        return tuple(x.unflatten(1, (y.shape[1], -1)).sum(2).to(y.dtype) for x, y in zip(whole, (q, k, v), strict=True))
