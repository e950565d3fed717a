"""From dialogues to the rectangles of a forward pass: one dialogue a row, or several packed side by side.

Packing changes how a batch is laid out, not which dialogues it has or what they weigh: losses and gradients are those
of one dialogue a row, to rounding.
"""

from dataclasses import dataclass
from itertools import chain

import torch

from data.batching.collate import balance, pad
from data.batching.packing import pack, restarting_positions
from data.dialogues import EncodedDialogue


@dataclass(frozen=True)
class Row:
    """The dialogues of one row of a forward pass, side by side."""

    dialogues: list[EncodedDialogue]

    @property
    def tokens(self) -> int:
        """Ids in the row."""
        return sum(len(dialogue.ids) for dialogue in self.dialogues)

    @property
    def answer_tokens(self) -> int:
        """Those of them that are learnt."""
        return sum(sum(dialogue.answer_mask) for dialogue in self.dialogues)

    @property
    def source(self) -> str:
        """Where the first dialogue's record stands."""
        return self.dialogues[0].source


@dataclass(frozen=True)
class Layout:
    """How rows are made. packing: several dialogues per row; flat: all rows of a forward end to end, as one.

    joined: the model itself leaves the padding out (utils/models/padding_free.py), so each row is one dialogue.
    Kernels with a mask (sdpa, eager, flex) take rectangles. Their packed rows are as long as the batch's longest
    dialogue and no longer, for attention computes, and its mask holds, row length ** 2 entries a row: a token costs
    more the longer its row is. Flash attention is told where each dialogue begins and ends, so its cost does not grow
    with the row; it wants everything in one row, which takes no padding and up to `max_tokens`.
    """

    packing: bool
    flat: bool
    max_tokens: int
    joined: bool = False

    def rows(self, dialogues: list[EncodedDialogue], num_ranks: int) -> list[Row]:
        """The dialogues of a batch in rows, at least as many as ranks while there are dialogues for that."""
        if not self.packing:
            return [Row([dialogue]) for dialogue in dialogues]
        lengths = [len(dialogue.ids) for dialogue in dialogues]
        window = max(lengths, default=1)
        if self.flat:
            window = max(window, self.max_tokens)
        rows = []
        for share in balance(lengths, num_ranks):
            places = pack([lengths[i] for i in share], window)
            rows += [Row([dialogues[share[k]] for k in row]) for row in places]
        return rows

    def collate(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(sequences, answer_mask, positions), each [rows, length] and right-padded; one row when flat.

        positions are None where every row is one dialogue: the model's own count then says the same, and attention
        needs no mask.
        """
        rows = self._laid_out(rows)
        ids, _ = pad([list(chain.from_iterable(d.ids for d in row.dialogues)) for row in rows], 0)
        answers, _ = pad([list(chain.from_iterable(d.answer_mask for d in row.dialogues)) for row in rows], 0)
        if all(len(row.dialogues) == 1 for row in rows):
            return ids, answers.bool(), None
        sizes = [[len(dialogue.ids) for dialogue in row.dialogues] for row in rows]
        positions = torch.stack([restarting_positions(lengths, ids.shape[1]) for lengths in sizes])
        return ids, answers.bool(), positions

    def real(self, rows: list[Row]) -> torch.Tensor:
        """Which places of `collate`'s rectangle hold a token: bool [rows, length]."""
        tokens = torch.tensor([row.tokens for row in self._laid_out(rows)])
        return torch.arange(int(tokens.max())) < tokens[:, None]

    def _laid_out(self, rows: list[Row]) -> list[Row]:
        flat = self.packing and self.flat
        return [Row([dialogue for row in rows for dialogue in row.dialogues])] if flat else rows
