"""Token log-probabilities from hidden states, a piece at a time: no logits of a whole batch. Pure."""

from collections.abc import Callable
from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from utils.tensors import before_tokens, places_of

CHUNK = 1024  # tokens that are worked on at once: 100 MB of logits in bf16 at 50,000 pieces
KEPT = 4  # chunks whose logits may wait for the backward pass
FLOATS = {"cpu": 1 << 20, "cuda": 1 << 24}  # of those logits, how many are float32 at once: what a cache holds; 64 MB


def sum_nll(
    hidden: torch.Tensor,
    sequences: torch.Tensor,
    token_mask: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    chunk: int = CHUNK,
    even_tokens: int = 0,
) -> torch.Tensor:
    """Sum of -log p(token t | tokens < t) over the masked tokens. -> float32 scalar.

    hidden: [batch, length, hidden], or [n, hidden] of the positions before masked tokens alone; sequences, token_mask:
    [batch, length], the mask False at index 0; lm_head: rows of hidden states -> logits. Only masked tokens get them.
    With more than KEPT * `chunk` of these, logits are made again in the backward pass rather than kept. even_tokens:
    where the head's weights are split over ranks (ZeRO-3), every rank has to call it equally often, however many tokens
    it has; then the most tokens of any forward.
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
    states = before_tokens(hidden, token_mask) if hidden.dim() > 2 else hidden
    targets = sequences.flatten()[places_of(token_mask, len(states))]
    return torch.stack(by_chunks(measure, states, targets, lm_head, chunk, even_tokens)).sum(0)


def by_chunks(
    measure: Callable, states: torch.Tensor, targets: torch.Tensor, lm_head: Callable, chunk: int, even_tokens: int = 0
) -> list:
    """measure(states, targets, lm_head) of at most `chunk` rows each; of more than KEPT, all are made again backwards.

    even_tokens: as in `sum_nll`.
    """
    count = max(1, -(-(even_tokens or len(targets)) // chunk))
    parts = zip(states.tensor_split(count), targets.tensor_split(count), strict=True)
    if count > KEPT:
        measure = partial(checkpoint, measure, use_reentrant=False, preserve_rng_state=False)
    return [measure(*part, lm_head) for part in parts]


def logits_bytes(chunk: int, element: int) -> tuple[int, int]:
    """Bytes at most on a GPU of logits made `chunk` at a time: (in a forward alone, in a forward and a backward).

    chunk: logits; element: bytes of one. Counts one chunk's gradient, and three float32 numbers per logit of its
    log-softmax.
    """
    in_float32 = 3 * 4 * FLOATS["cuda"]
    return chunk * element + in_float32, (KEPT + 1) * chunk * element + in_float32


def head_logits(lm_head: Callable[[torch.Tensor], torch.Tensor], config, rows: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocabulary] of hidden states [n, hidden]: the head, and the scalings that some architectures add."""
    logits = lm_head(rows.to(getattr(lm_head, "weight", rows).dtype))  # Mamba's states are float32
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        if scale := getattr(config, name, None):
            logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scale
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma, its cousin, xLSTM
        if cap := getattr(config, name, None):
            logits = cap * torch.tanh(logits / cap)
    return logits


def logprobs_and_entropy(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) of every row of logits / temperature, and the rows' entropy (or None). -> float32 [n] each.

    logits: [n, vocabulary], targets: [n]. The backward pass needs the logits and nothing else of their size: float32
    is made of a few rows at a time.
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
        ctx.set_materialize_grads(False)  # an entropy that no loss reads costs nothing
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logprob, by_entropy):
        logits, targets, entropy = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _few_rows(logits):
            every = _log_softmax(logits[rows], ctx.temperature)
            slope = torch.zeros_like(every[:, :1])  # of the loss by log p of any piece, over p
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
    """Float32, and a tensor of its own."""
    if temperature == 1.0:
        return torch.log_softmax(logits, -1, dtype=torch.float32)
    return torch.log_softmax(logits.float() / temperature, -1)


def _nll(states: torch.Tensor, targets: torch.Tensor, lm_head: Callable) -> torch.Tensor:
    return -logprobs_and_entropy(lm_head(states), targets)[0].sum()


def _nll_and_hits(states: torch.Tensor, targets: torch.Tensor, lm_head: Callable) -> torch.Tensor:
    logits = lm_head(states)
    hits = (logits.argmax(-1) == targets).sum()
    return torch.stack([-logprobs_and_entropy(logits, targets)[0].sum(), hits.float()])
