"""The data that the stages exchange: prompts -> rollout -> scores -> experience -> update.

Per-token tensors are [batch, length]; index t refers to token t of `sequences`; values are 0 where the mask is False.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch

from utils.tensors import to_device

PLACE_BITS = 40  # places of prompts are below 2^40, sizes of groups below 2^20


@dataclass(frozen=True)
class PromptBatch:
    """This rank's prompts of one buffer, one row per response; the responses of a prompt are neighbours on a rank.

    places: of the prompts in the run. members: of each response in its group, the responses of its prompt; all 0 where
    none are given. columns: the other columns of each prompt's record, for --reward_fn; empty if there are none.
    """

    ids: list[list[int]]
    turns: list[list[dict]]
    places: list[int]
    columns: list[dict[str, Any]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)

    @property
    def streams(self) -> list[int]:
        """The random stream of each response: a function of its place and member."""
        return [place + (member << PLACE_BITS) for place, member in self._pairs]

    @property
    def order(self) -> list[int]:
        """Numbers by which the rows of all ranks are sorted: by place, then by member."""
        return [(place << (63 - PLACE_BITS)) + member for place, member in self._pairs]

    def first_members(self, size: int) -> Self:
        """Returns one row per group of `size` rows, its first."""
        return replace(self, **{field.name: getattr(self, field.name)[::size] for field in fields(self)})

    @property
    def _pairs(self) -> Iterable[tuple[int, int]]:
        return zip(self.places, self.members or [0] * len(self.places), strict=True)


class Batch:
    """Tensors whose first dimension is the sample; an optional one may be None. Other fields are of the whole batch."""

    def rows(self, index) -> Self:
        """The samples at `index`: a slice, a tensor, or a list, which is copied to the device once for all tensors."""
        if isinstance(index, list):
            index = to_device(torch.tensor(index, dtype=torch.int64), self._first.device)
        return self.map(lambda column: column[index])

    def map(self, function) -> Self:
        """Applies a function to every tensor."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(x) for name, x in columns.items() if isinstance(x, torch.Tensor)})

    def __len__(self) -> int:
        return len(self._first)

    @property
    def _first(self) -> torch.Tensor:
        return getattr(self, fields(self)[0].name)


@dataclass(frozen=True)
class Rollout(Batch):
    """Prompts with sampled responses. sequences [batch, length] int64, right-padded; masks bool, made from lengths.

    `response_mask` is True on response tokens, the end token included. `ended` [batch] bool: it has an end token.
    """

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor
    ended: torch.Tensor


@dataclass(frozen=True)
class MeasuredRollout(Rollout):
    """A rollout with the sampler's own log-probabilities and entropies, as the fields of these names in `Scores`."""

    old_logprobs: torch.Tensor
    entropy: torch.Tensor


@dataclass(frozen=True)
class SampledRollout(Rollout):
    """A rollout of another engine than the policy's, with that engine's log-probabilities of the response tokens.

    sampler_logprobs [batch, length] float32: under the engine's own distribution at the sampling temperature, before
    top-p and repetition penalty, so that they compare with `Scores.old_logprobs`. Its sampler has the method `explain`
    that `sampler_problem` calls.
    """

    sampler_logprobs: torch.Tensor


@dataclass(frozen=True)
class Scores(Batch):
    """What the models compute for a rollout, float32; [batch, length] unless stated. old_values: None without a critic.

    entropy: of the sampling policy before each response token, nats. scores [batch]: what the policy learns from.
    member_scores [batch, reward models]. truncated bool [batch, reward models that encode answers again]. With
    --reward_fn: failed bool [batch], where it gave no score; parts [batch, part_names], NaN where there is none.
    groups [batch] int64: the place of the response's prompt. baselines [batch]: the score of the greedy response to the
    same prompt, for an estimator that needs it.
    """

    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    entropy: torch.Tensor
    old_values: torch.Tensor | None
    scores: torch.Tensor
    member_scores: torch.Tensor
    truncated: torch.Tensor
    failed: torch.Tensor | None = None
    parts: torch.Tensor | None = None
    part_names: tuple[str, ...] = ()
    groups: torch.Tensor | None = None
    baselines: torch.Tensor | None = None

    def rows_of_scores(self) -> list[dict[str, float | None]]:
        """Returns the score and the parts of each sample, None where there is none, for samples.jsonl."""
        if self.failed is None:
            return [{"score": score} for score in self.scores.tolist()]
        scores = torch.where(self.failed, math.nan, self.scores)[:, None]
        rows = torch.cat([scores, self.parts], 1).tolist()
        names = ("score", *self.part_names)
        return [{name: None if math.isnan(x) else x for name, x in zip(names, row, strict=True)} for row in rows]


@dataclass(frozen=True)
class Experience(Batch):
    """What the update reads: [batch, length]. old_values and returns are None without a critic.

    weights: factors of the policy's loss per token (`importance_weights`), None without --sampler_correction. groups
    [batch] int64: the place of the response's prompt. row_weights [batch]: of `ppo.loss.row_weights`, where needed.
    baselines [batch]: shaped scores of greedy responses, for an estimator that names them.
    """

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    old_values: torch.Tensor | None
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor | None
    weights: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    row_weights: torch.Tensor | None = None
    baselines: torch.Tensor | None = None
