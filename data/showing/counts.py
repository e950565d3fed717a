"""Counts over the records of a data set: lengths, duplicates, overlap. 16 bytes per record are held."""

from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from data.showing.items import Item

Duplicates = tuple[int, list[tuple[int, int]]]  # how many, and the first few as indices of two records
MAX_EXAMPLES = 3


@dataclass
class Counts:
    """Counts of one part of the data. prompts, records: a hash per record; 0 for one that cannot be used."""

    prompts: array = field(default_factory=lambda: array("Q"))
    records: array = field(default_factory=lambda: array("Q"))
    lengths: Counter[int] = field(default_factory=Counter)  # of records that are not dropped for their length, too
    named: Counter[str] = field(default_factory=Counter)
    differences: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # pairs, sum, chosen longer, chosen shorter

    def add_record(self, items: list[Item]) -> None:
        """Counts a record; without items, it cannot be used."""
        self.prompts.append(_hash(items[0].prompt) if items else 0)
        self.records.append(_hash(items) if items else 0)

    def add(self, item: Item, lengths: list[int]) -> None:
        """Counts an item. lengths: of the prompt or dialogue with each answer."""
        self.lengths[max(lengths)] += 1
        self.named["system"] += item.turns[0]["role"] == "system"
        for pair in item.pairs:
            gap = lengths[pair.better] - lengths[pair.worse]
            self.differences = [a + b for a, b in zip(self.differences, (1, gap, gap > 0, gap < 0), strict=True)]
            first, second = (item.answers[k].split() for k in (pair.better, pair.worse))
            self.named["blank"] += "".join(first) == "".join(second)


def _hash(value) -> int:
    return hash(repr(value)) % 2**64 or 1


def joined(hashes: list[array]) -> np.ndarray:
    """Returns the hashes of several parts as one array."""
    return np.concatenate([np.frombuffer(part, dtype=np.uint64) for part in hashes if part] or [np.zeros(0, np.uint64)])


def repeated(hashes: np.ndarray) -> Duplicates:
    """Returns how many records have the hash of an earlier one, and the first of them as (earlier, later)."""
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    later = np.sort(order[1:][(ranked[1:] == ranked[:-1]) & (ranked[1:] != 0)])
    first = order[np.searchsorted(ranked, hashes[later[:MAX_EXAMPLES]])]
    return len(later), list(zip(first.tolist(), later[:MAX_EXAMPLES].tolist(), strict=True))


def overlap(train: np.ndarray, valid: np.ndarray) -> Duplicates:
    """Returns how many records of `valid` have the hash of one of `train`, and the first as (in train, in valid)."""
    found = np.flatnonzero(np.isin(valid, train) & (valid != 0))
    pairs = [(int(np.argmax(train == valid[k])), int(k)) for k in found[:MAX_EXAMPLES]]
    return len(found), pairs


def bins(lengths: Counter[int]) -> list[tuple[str, int]]:
    """Returns the number of records per range of lengths; the ranges are powers of two."""
    sizes: Counter[int] = Counter()
    for length, number in lengths.items():
        sizes[length.bit_length()] += number
    return [(f"{1 << k >> 1}–{(1 << k) - 1}", sizes[k]) for k in range(min(sizes), max(sizes) + 1)]


def quantile(lengths: Counter[int], share: float) -> int:
    """Returns the smallest length that at least this share of the records does not exceed."""
    left = share * lengths.total()
    for length in sorted(lengths):
        left -= lengths[length]
        if left <= 1e-9:
            return length
    return max(lengths)
