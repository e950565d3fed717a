"""Pairs of answers as token ids, and the dynamic batches of Part II: as many pairs as a token count allows. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from data.order import order

MIN_PAIRS, MAX_PAIRS = 4, 128


@dataclass(frozen=True)
class EncodedPair:
    """Two whole dialogues that share their first `prompt_length` ids; the rest is the answer with its EOS."""

    chosen: list[int]
    rejected: list[int]
    prompt_length: int
    source: str

    @property
    def tokens(self) -> int:
        """Tokens of both dialogues, without padding."""
        return len(self.chosen) + len(self.rejected)

    @property
    def padded(self) -> int:
        """Tokens that the pair takes in a batch, where both rows are as long as the longer one."""
        return 2 * max(len(self.chosen), len(self.rejected))


def dynamic_batches(
    lengths: list[int], batch_size: int, seed: int, least: int = MIN_PAIRS, most: int = MAX_PAIRS
) -> Iterator[list[int]]:
    """Endless batches of indices whose summed length stays within batch_size x mean length.

    So many short pairs or few long ones make a step, `batch_size` of them on average, but at least `least` and at
    most `most`. A function of lengths and seed alone: every rank, and a resumed run, gets the same batches.
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
