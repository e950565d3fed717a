"""Functions on masked [batch, length] tensors, and the shift by one between logits and tokens. Pure."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def identity(x: torch.Tensor) -> torch.Tensor:
    """Returns `x`: the sum over ranks for one rank."""
    return x


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a host tensor to the device, through pinned memory, so that the host does not wait for a GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def sum_by_group(x: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Returns for each row the sum of x over the rows of its group. x, groups (integers): [batch] -> [batch]."""
    names, index = groups.unique(return_inverse=True)
    return torch.zeros(len(names), dtype=x.dtype, device=x.device).index_add_(0, index, x)[index]


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean of x where mask is True, 0 if it is nowhere. x, mask: same shape -> float32 scalar."""
    mask = mask.bool()
    return x.float().masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(
    x: torch.Tensor, mask: torch.Tensor, sum_ranks: Callable[[torch.Tensor], torch.Tensor] = identity
) -> torch.Tensor:
    """Returns x with mean 0 and population variance 1 over the masked entries of all ranks, and 0 elsewhere.

    x, mask: [batch, length] -> float32 like x. Adds 1e-6 to the variance. sum_ranks: sums a tensor over ranks.
    """
    mask = mask.bool()
    x = x.float().masked_fill(~mask, 0.0)
    total, count = sum_ranks(torch.stack([x.sum(), mask.sum().float()])).unbind()
    count = count.clamp(min=1)
    centred = (x - total / count).masked_fill(~mask, 0.0)
    variance = sum_ranks(centred.square().sum()) / count
    return centred * torch.rsqrt(variance + 1e-6)


def token_logprobs(logits: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Returns log p(token t | tokens < t) at index t, 0 at index 0: float32 [batch, length].

    logits: [batch, length, vocabulary], sequences: [batch, length].
    """
    logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    picked = logprobs.gather(-1, sequences[:, 1:, None]).squeeze(-1)
    return F.pad(picked, (1, 0))


def before_tokens(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the states that predict the masked tokens, of t - 1 for token t. [batch, length, ...] -> [n, ...]."""
    return states[:, :-1][mask[:, 1:]]


def places_of(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Returns flat indices of the `count` True entries: [count]. Needs no GPU synchronisation, as it knows `count`."""
    return mask.flatten().nonzero_static(size=count).squeeze(1)


def at_tokens(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scatters one value per masked token to its position. rows: [n], mask: [batch, length], n True -> like mask."""
    places = places_of(mask, len(rows))
    return rows.new_zeros(mask.numel()).index_copy(0, places, rows).view(mask.shape)


def shift_to_next(x: torch.Tensor) -> torch.Tensor:
    """Moves values from t - 1 to t, with 0 at index 0: outputs per position become values per token."""
    return F.pad(x[:, :-1], (1, 0))


def before(mask: torch.Tensor) -> torch.Tensor:
    """Moves a mask from t to t - 1: marks positions that `shift_to_next` moves to masked tokens. [batch, length]."""
    return F.pad(mask[:, 1:], (0, 1))


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Returns 0, 1, 2 … over the tokens of each row, with padding on any side. [batch, length] bool -> int64."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_index(mask: torch.Tensor) -> torch.Tensor:
    """Returns the index of the last True of each row, 0 if there is none. [batch, length] -> [batch] int64."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return (mask.long() * places).amax(dim=1)
