"""Answers to compare as token ids, and the dynamic batches of Part II: as many pairs as a token count allows. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from data.order import order

MIN_PAIRS, MAX_PAIRS = 4, 128


@dataclass(frozen=True)
class Pull:
    """What a step's contrastive loss asks of one item; see `reward.contrastive`.

    losses: [pairs]; gradient: [pairs, 2, hidden], of the summed loss by the two views of each pair's features; seed: of
    the dropout that made the views (any on ranks that do not forward the item).
    """

    losses: torch.Tensor
    gradient: torch.Tensor
    seed: int


@dataclass(frozen=True)
class Comparison:
    """Whole dialogues that share their first `prompt_length` ids; the rest of each is an answer with its end token.

    behind: ids that the template writes behind the end token, which no loss counts.
    pairs: (place of the better answer, of the worse); margins: one a pair; subset, source: as in data.preferences;
    place: of the preference among all that were encoded. Of a pair record there is one pair; of a ranked list, all.
    Without pairs: answers to be scored alone.
    """

    answers: list[list[int]]
    prompt_length: int
    pairs: list[tuple[int, int]]
    margins: list[float]
    subset: str
    source: str
    place: int = 0
    behind: int = 0
    pull: Pull | None = None

    @property
    def best(self) -> int:
        """Place of the best answer: the first that beats one and is beaten by none."""
        beaten = {worse for _, worse in self.pairs}
        return next(better for better, _ in self.pairs if better not in beaten)

    @property
    def tokens(self) -> int:
        """Tokens of all dialogues, without padding."""
        return sum(map(len, self.answers))

    @property
    def padded(self) -> int:
        """Tokens that they take in a batch, where every row is as long as the longest."""
        return len(self.answers) * max(map(len, self.answers))

    @property
    def answer_lengths(self) -> list[int]:
        """Tokens of every answer, its end token included."""
        return [len(ids) - self.prompt_length - self.behind for ids in self.answers]


@dataclass(frozen=True)
class PairIndex:
    """Pairs of a batch of comparisons whose answers stand one after the other: rows of the better and worse answer.

    weights: 1 / pairs of the comparison, so that every prompt counts once (InstructGPT eq. 1); all of them [pairs].
    """

    better: torch.Tensor
    worse: torch.Tensor
    weights: torch.Tensor
    margins: torch.Tensor

    def to(self, device: torch.device) -> "PairIndex":
        """The same on another device."""
        return PairIndex(*(x.to(device) for x in (self.better, self.worse, self.weights, self.margins)))


def ranges_of(counts: Iterable[int]) -> list[range]:
    """The places that each item's `count` rows take when all stand one after the other."""
    ranges, start = [], 0
    for count in counts:
        ranges.append(range(start, start + count))
        start += count
    return ranges


def pair_index(items: list[Comparison]) -> PairIndex:
    """The pairs of all items, on the CPU."""
    better, worse, weights, margins = [], [], [], []
    for item, rows in zip(items, ranges_of(len(item.answers) for item in items), strict=True):
        better += [rows[i] for i, _ in item.pairs]
        worse += [rows[j] for _, j in item.pairs]
        weights += [1 / len(item.pairs)] * len(item.pairs)
        margins += item.margins
    rows = (torch.tensor(x, dtype=torch.int64) for x in (better, worse))
    numbers = (torch.tensor(x, dtype=torch.float32) for x in (weights, margins))
    return PairIndex(*rows, *numbers)


def dynamic_batches(
    lengths: list[int], batch_size: int, seed: int, least: int = MIN_PAIRS, most: int = MAX_PAIRS
) -> Iterator[list[int]]:
    """Endless batches of indices whose summed length stays within batch_size x mean length.

    So many short items or few long ones make a step, about `batch_size` of them (somewhat fewer, as none passes the
    budget: a tenth at 8), but at least `least` and at most `most`. A function of lengths and seed alone: every rank,
    and a resumed run, gets the same batches.
    """
    budget = batch_size * sum(lengths) / len(lengths)
    position = 0
    while True:
        batch, total = [], 0
        for index in order(position, most, len(lengths), seed):
            if len(batch) >= least and total + lengths[index] > budget:
                break
            batch.append(index)
            total += lengths[index]
        position += len(batch)
        yield batch
