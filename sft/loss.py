"""Next-token loss on answers. Pure."""

from collections.abc import Callable

import torch

from utils.models.chunked_logprobs import sum_nll


def answer_loss(
    hidden: torch.Tensor, sequences: torch.Tensor, answer_mask: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor], num_tokens: float = 1.0, even_tokens: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Returns the cross entropy of the answer tokens (end tokens included), summed and divided by `num_tokens`.

    hidden, even_tokens: as in `sum_nll`. sequences, answer_mask: [batch, length], right-padded. num_tokens: answer
    tokens of the global batch, so that losses of micro-batches and ranks add up. Result: a float32 scalar.
    """
    return sum_nll(hidden, sequences, answer_mask, lm_head, even_tokens=even_tokens) / num_tokens
