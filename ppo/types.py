"""What flows between the stages: prompts -> rollout -> scores -> experience -> update.

Every per-token tensor is [batch, length]; index t is about token t of `sequences`; 0 where its mask is False.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch

from utils.tensors import to_device


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one buffer, this rank's share.

    `places` are their places in the run: they pick the random streams, and the order of joined rows.
    """

    ids: list[list[int]]
    turns: list[list[dict]]
    places: list[int]


class Batch:
    """Tensors whose first dimension is the sample."""

    def rows(self, index) -> Self:
        """The samples at `index`: a slice, a tensor, or a list, which is copied to the device once for all tensors."""
        columns = [getattr(self, f.name) for f in fields(self)]
        if isinstance(index, list):
            index = to_device(torch.tensor(index, dtype=torch.int64), columns[0].device)
        return type(self)(*(column[index] for column in columns))

    def map(self, function) -> Self:
        """Applies a function to every tensor."""
        return replace(self, **{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))


@dataclass(frozen=True)
class Rollout(Batch):
    """Prompts with sampled responses. sequences [batch, length] int64, right-padded; masks bool, made from lengths.

    `response_mask` is True on response tokens, the end token included. `ended` [batch] bool: one was sampled.
    """

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor
    ended: torch.Tensor


@dataclass(frozen=True)
class MeasuredRollout(Rollout):
    """With what the sampler saw of each response token: the fields of the same names in `Scores`."""

    old_logprobs: torch.Tensor
    entropy: torch.Tensor


@dataclass(frozen=True)
class Scores(Batch):
    """What the four models say of a rollout: float32, [batch, length] but for the scores.

    `entropy` is the sampling policy's, in nats, before each response token. `scores` [batch] is what the policy learns
    from, `member_scores` [batch, reward models] what each reward model says by itself. `truncated` bool [batch, those
    of them that encode answers anew]: the dialogue was too long for that model's window.
    """

    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    entropy: torch.Tensor
    old_values: torch.Tensor
    scores: torch.Tensor
    member_scores: torch.Tensor
    truncated: torch.Tensor


@dataclass(frozen=True)
class Experience(Batch):
    """What the update reads: [batch, length]. `returns` come from the advantages before any normalisation."""

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    old_values: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
