"""Token negative log-likelihood from hidden states, a piece at a time: no logits of a whole batch. Pure."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from utils.tensors import before_tokens

CHUNK = 1024  # tokens whose logits are held at once: 200 MB in float32 at 50,000 pieces


def sum_nll(
    hidden: torch.Tensor,
    sequences: torch.Tensor,
    token_mask: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    chunk: int = CHUNK,
    even_tokens: int = 0,
) -> torch.Tensor:
    """Sum of -log p(token t | tokens < t) over the masked tokens. -> float32 scalar.

    hidden: [batch, length, hidden]; sequences, token_mask: [batch, length], the mask False at index 0; lm_head: rows
    of hidden states -> logits. Only masked tokens get logits. With more than `chunk` of them, logits are made again
    in the backward pass rather than kept. even_tokens: where the head's weights are split over ranks (ZeRO-3) every
    rank has to call it equally often, however many tokens it has; then the most tokens of any forward.
    """
    return _over_chunks(_nll, hidden, sequences, token_mask, lm_head, chunk, even_tokens)


def nll_and_hits(
    hidden: torch.Tensor,
    sequences: torch.Tensor,
    token_mask: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    chunk: int = CHUNK,
    even_tokens: int = 0,
) -> torch.Tensor:
    """What `sum_nll` gives, and how many of the masked tokens were the likeliest of all. -> float32 [2]."""
    return _over_chunks(_nll_and_hits, hidden, sequences, token_mask, lm_head, chunk, even_tokens)


def _over_chunks(
    measure: Callable, hidden: torch.Tensor, sequences: torch.Tensor, token_mask: torch.Tensor, lm_head: Callable,
    chunk: int, even_tokens: int,
) -> torch.Tensor:  # fmt: skip
    states, targets = before_tokens(hidden, token_mask), sequences[token_mask]
    count = max(1, -(-(even_tokens or len(targets)) // chunk))
    if count == 1:
        return measure(states, targets, lm_head)
    parts = zip(states.tensor_split(count), targets.tensor_split(count), strict=True)
    return torch.stack([checkpoint(measure, *part, lm_head, use_reentrant=False) for part in parts]).sum(0)


def head_logits(lm_head: Callable[[torch.Tensor], torch.Tensor], config, rows: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocabulary] of hidden states [n, hidden]: the head, and the scalings that some architectures add."""
    logits = lm_head(rows)
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


def _nll(states: torch.Tensor, targets: torch.Tensor, lm_head: Callable) -> torch.Tensor:
    return F.cross_entropy(lm_head(states).float(), targets, reduction="sum")


def _nll_and_hits(states: torch.Tensor, targets: torch.Tensor, lm_head: Callable) -> torch.Tensor:
    logits = lm_head(states).float()
    hits = (logits.argmax(-1) == targets).sum()
    return torch.stack([F.cross_entropy(logits, targets, reduction="sum"), hits.float()])
