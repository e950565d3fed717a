"""Encoded comparisons of answers, and the dynamic batches of Part II, whose size follows the token count. Pure."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

MIN_PAIRS, MAX_PAIRS = 4, 128


@dataclass(frozen=True)
class CachedGradient:
    """The contrastive loss of one comparison and its gradient; see `reward.contrastive`.

    losses: [pairs]. gradient: [pairs, 2, hidden], of the summed loss with respect to the two views of each pair. seed:
    of the dropout in the views' forward pass; arbitrary on ranks that do not run it.
    """

    losses: torch.Tensor
    gradient: torch.Tensor
    seed: int


@dataclass(frozen=True)
class Comparison:
    """Encoded answers to one prompt, and the pairs to compare; without pairs, the answers are only scored.

    answers: ids of whole dialogues, which share their first `prompt_length` ids. pairs: (better index, worse index).
    place: index of the preference in the encoded list. suffix_length: ids after the end token, which no loss counts.
    """

    answers: list[list[int]]
    prompt_length: int
    pairs: list[tuple[int, int]]
    margins: list[float]
    subset: str
    source: str
    place: int = 0
    suffix_length: int = 0
    cached_gradient: CachedGradient | None = None

    @property
    def best(self) -> int:
        """Index of the best answer: the first that is better in a pair and worse in none."""
        beaten = {worse for _, worse in self.pairs}
        return next(better for better, _ in self.pairs if better not in beaten)

    @property
    def tokens(self) -> int:
        """Number of tokens of all dialogues, without padding."""
        return sum(map(len, self.answers))

    @property
    def padded_tokens(self) -> int:
        """Number of tokens of all dialogues, padded to the longest."""
        return len(self.answers) * max(map(len, self.answers))

    @property
    def answer_lengths(self) -> list[int]:
        """Number of tokens per answer, with its end token."""
        return [len(ids) - self.prompt_length - self.suffix_length for ids in self.answers]


@dataclass(frozen=True)
class PairIndex:
    """Pairs of a batch: rows of the better and the worse answer when all answers are concatenated; all [pairs].

    weights: 1 / number of pairs of the comparison, so that each prompt counts once (InstructGPT eq. 1).
    """

    better: torch.Tensor
    worse: torch.Tensor
    weights: torch.Tensor
    margins: torch.Tensor

    def to(self, device: torch.device) -> "PairIndex":
        """Returns a copy on a device."""
        return PairIndex(*(x.to(device) for x in (self.better, self.worse, self.weights, self.margins)))


def row_ranges(counts: Iterable[int]) -> list[range]:
    """Returns the range of rows per item when the rows of all items are concatenated."""
    ranges, start = [], 0
    for count in counts:
        ranges.append(range(start, start + count))
        start += count
    return ranges


def pair_index(items: list[Comparison]) -> PairIndex:
    """Returns the pairs of all items, on the CPU."""
    better, worse, weights, margins = [], [], [], []
    for item, rows in zip(items, row_ranges(len(item.answers) for item in items), strict=True):
        better += [rows[i] for i, _ in item.pairs]
        worse += [rows[j] for _, j in item.pairs]
        weights += [1 / len(item.pairs)] * len(item.pairs)
        margins += item.margins
    rows = (torch.tensor(x, dtype=torch.int64) for x in (better, worse))
    numbers = (torch.tensor(x, dtype=torch.float32) for x in (weights, margins))
    return PairIndex(*rows, *numbers)


def dynamic_batches(
    take: Callable[[int, int], list[Comparison]], budget: float, min_size: int = MIN_PAIRS, max_size: int = MAX_PAIRS
) -> Iterator[list[Comparison]]:
    """Yields batches without end, each of `min_size` to `max_size` items.

    A batch takes items as long as their total length is at most `budget`, the batch size times the mean length: many
    short items or few long ones. take: (start, count) -> items at these places of the run. The batches depend on these
    items only, so that they are the same on all ranks and after resuming.
    """
    position = 0
    while True:
        batch, total = [], 0
        while len(batch) < max_size:
            (item,) = take(position, 1)
            if len(batch) >= min_size and total + item.tokens > budget:
                break
            batch.append(item)
            total += item.tokens
            position += 1
        yield batch
