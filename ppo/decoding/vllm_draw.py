"""Draws the tokens of vLLM's responses with `sample`: a logits processor, whose interface is vLLM's LogitsProcessor."""

from dataclasses import dataclass

import torch

from ppo.decoding.sampling import Sampling, sample, uniforms
from utils.models.chunked_logprobs import logprobs_and_entropy
from utils.tensors import to_device


@dataclass
class Draws:
    """What the tokens of one call are drawn with, and what is recorded: one row per prompt, one column per token."""

    places: torch.Tensor
    sampling: Sampling
    seed: int
    tokens: torch.Tensor
    logprobs: torch.Tensor
    seen: torch.Tensor | None = None


class Draw:
    """Draws a token per row of logits, and leaves only this token, which vLLM then picks as the most likely one.

    Random numbers, top-p and penalty are therefore those of `sample`, and log-probabilities those of the model.
    """

    def __init__(self, *_):
        self.draws: Draws | None = None
        self.rows: dict[int, tuple[int, list[int]]] = {}  # by place in vLLM's batch: row, tokens so far
        self.made.append(self)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, update) -> None:
        """Follows vLLM's changes of its batch, in the order that vLLM's interface prescribes."""
        if update is None:
            return
        for place in update.removed:
            self.rows.pop(place, None)
        for place, params, _, tokens in update.added:
            self.rows[place] = (params.extra_args["row"], tokens)
        for source, target, way in update.moved:
            moved, replaced = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if replaced is not None and way.name == "SWAP":
                self.rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [batch, vocabulary] -> the same shape, -inf but for one token."""
        draws, batch = self.draws, [self.rows[place] for place in range(len(logits))]
        numbers = [[row for row, _ in batch], [len(tokens) for _, tokens in batch]]
        row, count = to_device(torch.tensor(numbers), logits.device)
        if draws.sampling.repetition_penalty != 1.0:
            self._mark_seen(row, count, [tokens[-1] if tokens else 0 for _, tokens in batch], logits.shape[-1])
        seen = None if draws.seen is None else draws.seen[row]
        token = sample(logits, uniforms(draws.seed, draws.places[row], count), draws.sampling, seen)
        logprobs, _ = logprobs_and_entropy(logits, token, draws.sampling.temperature, with_entropy=False)
        # Of a prompt that vLLM processes in parts, each part draws the same place; the last one counts.
        draws.tokens[row, count], draws.logprobs[row, count] = token, logprobs
        return torch.full_like(logits, -float("inf")).scatter_(1, token[:, None], 0.0)

    def _mark_seen(self, row: torch.Tensor, count: torch.Tensor, last: list[int], vocabulary: int) -> None:
        draws = self.draws
        if draws.seen is None:
            draws.seen = torch.zeros(len(draws.places), vocabulary, dtype=torch.bool, device=row.device)
        draws.seen[row, to_device(torch.tensor(last), row.device)] |= count > 0
