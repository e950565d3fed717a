"""Arrange dialogues in the rows of a forward pass: one dialogue per row, or several packed in a row.

Packing changes only the layout of a batch: losses and gradients are those of one dialogue per row, up to rounding.
"""

from dataclasses import dataclass
from itertools import chain

import torch

from data.batching.collate import balance, pad
from data.batching.packing import pack, restarting_positions
from data.dialogues import EncodedDialogue


@dataclass(frozen=True)
class PackedRow:
    """The dialogues in one row of a forward pass."""

    dialogues: list[EncodedDialogue]

    @property
    def tokens(self) -> int:
        """Number of tokens in the row."""
        return sum(len(dialogue.ids) for dialogue in self.dialogues)

    @property
    def answer_tokens(self) -> int:
        """Number of tokens to train on."""
        return sum(sum(dialogue.answer_mask) for dialogue in self.dialogues)

    @property
    def source(self) -> str:
        """Place of the first dialogue's record."""
        return self.dialogues[0].source


@dataclass(frozen=True)
class Layout:
    """How dialogues are arranged in rows.

    packing: several dialogues per row. flat: one row of up to `max_tokens` per forward pass, for flash attention, whose
    cost does not depend on the row length; other kernels get rows as long as the batch's longest dialogue. joined: the
    model runs without padding (utils/models/padding_free.py), with one dialogue per row.
    """

    packing: bool
    flat: bool
    max_tokens: int
    joined: bool = False

    def rows(self, dialogues: list[EncodedDialogue], num_ranks: int) -> list[PackedRow]:
        """Returns the dialogues of a batch in rows, at least one per rank if there are enough dialogues."""
        if not self.packing:
            return [PackedRow([dialogue]) for dialogue in dialogues]
        lengths = [len(dialogue.ids) for dialogue in dialogues]
        window = max(lengths, default=1)
        if self.flat:
            window = max(window, self.max_tokens)
        rows = []
        for share in balance(lengths, num_ranks):
            places = pack([lengths[i] for i in share], window)
            rows += [PackedRow([dialogues[share[k]] for k in row]) for row in places]
        return rows

    def collate(self, rows: list[PackedRow]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns (sequences, answer_mask, positions), each [rows, length] and right-padded; one row if flat.

        positions is None if each row is one dialogue.
        """
        rows = self._laid_out(rows)
        ids, _ = pad([list(chain.from_iterable(d.ids for d in row.dialogues)) for row in rows], 0)
        answers, _ = pad([list(chain.from_iterable(d.answer_mask for d in row.dialogues)) for row in rows], 0)
        if all(len(row.dialogues) == 1 for row in rows):
            return ids, answers.bool(), None
        sizes = [[len(dialogue.ids) for dialogue in row.dialogues] for row in rows]
        positions = torch.stack([restarting_positions(lengths, ids.shape[1]) for lengths in sizes])
        return ids, answers.bool(), positions

    def real(self, rows: list[PackedRow]) -> torch.Tensor:
        """Returns a bool mask [rows, length] that is True at the tokens of `collate`'s sequences."""
        tokens = torch.tensor([row.tokens for row in self._laid_out(rows)])
        return torch.arange(int(tokens.max())) < tokens[:, None]

    def _laid_out(self, rows: list[PackedRow]) -> list[PackedRow]:
        flat = self.packing and self.flat
        return [PackedRow([dialogue for row in rows for dialogue in row.dialogues])] if flat else rows
