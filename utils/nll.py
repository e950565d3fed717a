"""Token negative log-likelihood from hidden states, a piece at a time: no logits of a whole batch. Pure."""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from utils.tensors import before_tokens

CHUNK = 1024  # tokens that are worked on at once: 200 MB of logits in float32 at 50,000 pieces
KEPT = 4  # chunks whose logits, in the model's dtype, may wait for the backward pass: 400 MB in bf16 at 50,000 pieces


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
    of hidden states -> logits. Only masked tokens get logits. With more than KEPT * `chunk` of them, logits are made
    again in the backward pass rather than kept. even_tokens: where the head's weights are split over ranks (ZeRO-3),
    every rank has to call it equally often, however many tokens it has; then the most tokens of any forward.
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
    parts = zip(states.tensor_split(count), targets.tensor_split(count), strict=True)
    if count > KEPT:
        measure = partial(checkpoint, measure, use_reentrant=False)
    return torch.stack([measure(*part, lm_head) for part in parts]).sum(0)


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


class _SumNLL(torch.autograd.Function):
    """Cross entropy, summed, in float32; between forward and backward only the logits are held, in their own dtype.

    `F.cross_entropy(logits.float())` holds their log-softmax in float32 instead: twice as much for bf16.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        scores = logits.float()
        normalizers = scores.logsumexp(-1)
        ctx.save_for_backward(logits, targets, normalizers)
        return (normalizers - scores.gather(-1, targets[:, None]).squeeze(-1)).sum()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, normalizers = ctx.saved_tensors
        slope = (logits.float() - normalizers[:, None]).exp_()  # p(piece); 1 less at the token that came
        slope.scatter_add_(-1, targets[:, None], slope.new_full((len(targets), 1), -1.0))
        return slope.mul_(gradient).to(logits.dtype), None


def _nll(states: torch.Tensor, targets: torch.Tensor, lm_head: Callable) -> torch.Tensor:
    return _SumNLL.apply(lm_head(states), targets)


def _nll_and_hits(states: torch.Tensor, targets: torch.Tensor, lm_head: Callable) -> torch.Tensor:
    logits = lm_head(states)
    hits = (logits.argmax(-1) == targets).sum()
    return torch.stack([_SumNLL.apply(logits, targets), hits.float()])
