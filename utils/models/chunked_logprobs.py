"""Token log-probabilities from hidden states, in chunks, without logits of a whole batch. Pure."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from utils.tensors import before_tokens, places_of

CHUNK = 1024  # tokens per chunk: 100 MB of logits in bf16 for a vocabulary of 50,000
KEPT = 4  # chunks whose logits are kept for the backward pass
FLOATS = {"cpu": 1 << 20, "cuda": 1 << 24}  # logits in float32 at a time: 4 MB for a cache; 64 MB


def _nll(states: torch.Tensor, targets: torch.Tensor, lm_head: Callable) -> torch.Tensor:
    return -logprobs_and_entropy(lm_head(states), targets)[0].sum()


def _nll_and_hits(states: torch.Tensor, targets: torch.Tensor, lm_head: Callable) -> torch.Tensor:
    logits = lm_head(states)
    hits = (logits.argmax(-1) == targets).sum()
    return torch.stack([-logprobs_and_entropy(logits, targets)[0].sum(), hits.float()])


def sum_nll(
    hidden: torch.Tensor, sequences: torch.Tensor, token_mask: torch.Tensor, lm_head: Callable, chunk: int = CHUNK,
    even_tokens: int = 0, measure: Callable = _nll,
) -> torch.Tensor:  # fmt: skip
    """Returns the sum of -log p(token t | tokens < t) over the masked tokens: float32 scalar.

    hidden: [batch, length, hidden], or [n, hidden] of the positions before masked tokens; sequences, token_mask:
    [batch, length], the mask False at index 0; lm_head: rows of hidden states -> logits, called for masked tokens only.
    Above KEPT * `chunk` of these, the backward pass recomputes logits. even_tokens: largest number of tokens of any
    forward, if the head's weights are split over ranks (ZeRO-3), so that all ranks call the head equally often.
    """
    states = before_tokens(hidden, token_mask) if hidden.dim() > 2 else hidden
    targets = sequences.flatten()[places_of(token_mask, len(states))]
    return torch.stack(by_chunks(measure, states, targets, lm_head, chunk, even_tokens)).sum(0)


def nll_and_hits(
    hidden: torch.Tensor, sequences: torch.Tensor, token_mask: torch.Tensor, lm_head: Callable, chunk: int = CHUNK,
    even_tokens: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Returns `sum_nll` and the number of masked tokens with the largest logit: float32 [2]."""
    return sum_nll(hidden, sequences, token_mask, lm_head, chunk, even_tokens, _nll_and_hits)


def by_chunks(
    measure: Callable, states: torch.Tensor, targets: torch.Tensor, lm_head: Callable, chunk: int, even_tokens: int = 0
) -> list:
    """Returns measure(states, targets, lm_head) per chunk; above KEPT chunks, the backward pass recomputes them."""
    count = max(1, -(-(even_tokens or len(targets)) // chunk))
    parts = zip(states.tensor_split(count), targets.tensor_split(count), strict=True)
    if count > KEPT:
        measure = partial(checkpoint, measure, use_reentrant=False, preserve_rng_state=False)
    return [measure(*part, lm_head) for part in parts]


def logits_bytes(chunk: int, element: int, most: float = math.inf) -> tuple[int, int]:
    """Returns the peak bytes on a GPU of chunked logits: (forward only, forward and backward).

    chunk: logits per chunk; element: bytes per logit; most: logits of a whole forward. Counts one chunk's gradient and
    its log-softmax in float32.
    """
    in_float32 = 3 * 4 * FLOATS["cuda"]
    one, kept = int(min(chunk, most)), int(min(KEPT * chunk, most))
    return one * element + in_float32, (kept + one) * element + in_float32


def head_logits(lm_head: Callable[[torch.Tensor], torch.Tensor], config, rows: torch.Tensor) -> torch.Tensor:
    """Returns logits [n, vocabulary] of hidden states [n, hidden], scaled as some architectures require."""
    logits = lm_head(rows.to(getattr(lm_head, "weight", rows).dtype))  # Mamba's states are float32
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        if scale := getattr(config, name, None):
            logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scale
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma 2, -, xLSTM
        if cap := getattr(config, name, None):
            logits = cap * torch.tanh(logits / cap)
    return logits


def logprobs_and_entropy(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns log p(target) per row of logits / temperature, and the entropy per row or None: float32 [n] each.

    logits: [n, vocabulary], targets: [n]. Forward and backward convert a few rows at a time to float32, and keep no
    other tensor of the logits' size.
    """
    return _LogProbs.apply(logits, targets, temperature, with_entropy)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, with_entropy):
        logprobs = logits.new_empty(len(logits), dtype=torch.float32)
        entropy = torch.empty_like(logprobs) if with_entropy else None
        for rows in _few_rows(logits):
            every = _log_softmax(logits[rows], temperature)
            logprobs[rows] = every.gather(-1, targets[rows, None]).squeeze(-1)
            if with_entropy:
                entropy[rows] = -every.exp().mul_(every).sum(-1)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, targets, entropy)
        ctx.set_materialize_grads(False)  # an entropy that no loss uses costs nothing
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logprob, by_entropy):
        logits, targets, entropy = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _few_rows(logits):
            every = _log_softmax(logits[rows], ctx.temperature)
            slope = torch.zeros_like(every[:, :1])  # d loss / d log p, divided by p
            if by_logprob is not None:
                slope = slope - by_logprob[rows, None]
            if by_entropy is None:
                slope = every.exp_().mul_(slope)
            else:
                slope = (slope - by_entropy[rows, None] * (every + entropy[rows, None])).mul_(every.exp_())
            if by_logprob is not None:
                slope.scatter_add_(-1, targets[rows, None], by_logprob[rows, None])
            gradient[rows] = slope.div_(ctx.temperature)
        return gradient, None, None, None


def _few_rows(logits: torch.Tensor) -> list[slice]:
    size = max(1, FLOATS[logits.device.type] // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns a new float32 tensor."""
    if temperature == 1.0:
        return torch.log_softmax(logits, -1, dtype=torch.float32)
    return torch.log_softmax(logits.float() / temperature, -1)
