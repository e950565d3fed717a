"""A preallocated key-value cache whose rows, the slots, are handed from one response to the next.

All slots write the same column at each step, so that their tokens end in the same place: to a model the cache looks
like a left-padded batch, and what works with one (sliding windows, ALiBi, learned positions) works here.
"""

import weakref

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from utils.tensors import to_device


def columns_for(tokens: int) -> int:
    """Columns of a cache for sequences of so many tokens: an eighth more, so that columns seldom have to move."""
    return tokens + max(16, tokens // 8)


def slots_for(wanted: int, columns: int, cache_tokens: int) -> int:
    """How many of the wanted slots a cache of so many tokens (0: any number) has room for; at least 1."""
    return max(1, min(wanted, cache_tokens // columns)) if cache_tokens else wanted


AUTO_SLOTS = 32  # under --rollout_batch_size auto where free memory is not known, such as on a CPU


def slots_in(room: int, slot: int, prompts: int) -> int:
    """How many slots of `slot` bytes fit `room` bytes: at least 1, at most one per prompt.

    From 4 on a multiple of 4, so that small differences in free memory from run to run give the same number.
    """
    fitting = max(1, room // slot)
    return min(prompts, fitting if fitting < 4 else fitting // 4 * 4)


class SlotCache(Cache):
    """Keys and values of the last tokens of `num_slots` sequences, allocated at the first forward and never copied.

    The first `live` slots are in use. Slot i holds the `lengths[i]` columns before column `end`, and `mask` [num_slots,
    num_columns] is True from its first one on. Before a forward, `append` makes room for new prompts or `advance` for
    one token more in every live slot: the forward's keys and values go there.

    After `advance`, two tensors on the device tell kernels the column of the newest tokens, `newest`, and the `first`
    column of each slot, which lies behind `newest` where the slot is not in use.
    """

    is_compileable = True  # transformers then makes every mask without asking the device whether it is needed

    def __init__(self, num_slots: int, num_columns: int, device: torch.device):
        super().__init__(layers=[])
        self.num_slots, self.num_columns = num_slots, num_columns
        self.mask = torch.zeros(num_slots, num_columns, dtype=torch.bool, device=device)
        self.first = torch.full((num_slots,), num_columns, dtype=torch.int32, device=device)
        self.newest = torch.zeros((), dtype=torch.int32, device=device)
        self.first_is_old = False
        self.lengths: list[int] = []
        self.end = 0
        self.rows, self.written, self.read, self.sources = slice(0), slice(0), None, None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """What a model's attention calls: keeps these, returns those that they may attend to."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_SlotLayer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    @property
    def live(self) -> int:
        """Slots in use."""
        return len(self.lengths)

    def append(self, mask: torch.Tensor, lengths: list[int], sources: torch.Tensor | None) -> None:
        """New slots behind the live ones for left-padded prompts. mask: [prompts, width], lengths: tokens of each.

        sources: [prompts], which row of the forward each comes from, where the forward has fewer: equal prompts.
        """
        width = mask.shape[1]
        if self.end < width or not self.live:
            self._move_columns(max(width, max(self.lengths, default=0)))
        self.rows = slice(self.live, self.live + len(lengths))
        self.written, self.read, self.sources = slice(self.end - width, self.end), None, sources
        self.mask[self.rows, : self.end - width] = False
        self.mask[self.rows, self.written] = mask
        self.mask[self.rows, self.end :] = True
        self.lengths += lengths
        self.first_is_old = True

    def advance(self) -> torch.Tensor:
        """One column more. Returns the mask [live, columns from the longest slot's first token on]."""
        longest = max(self.lengths)
        if self.end == self.num_columns:
            self._move_columns(longest)
        if self.first_is_old:
            first = [self.end - length for length in self.lengths]
            first += [self.num_columns] * (self.num_slots - self.live)
            self.first.copy_(to_device(torch.tensor(first, dtype=torch.int32), self.first.device))
            self.first_is_old = False
        self.newest.fill_(self.end)
        self.rows, self.sources = slice(0, self.live), None
        self.written, self.read = slice(self.end, self.end + 1), slice(self.end - longest, self.end + 1)
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]
        return self.mask[self.rows, self.read]

    def keep(self, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Gives all other slots up; the last of the kept ones take their places. Returns (from, to) if any moved."""
        kept = set(slots)
        holes = [i for i in range(len(slots)) if i not in kept]
        movers = [i for i in slots if i >= len(slots)]
        moved = None
        if movers:
            columns = slice(self.end - max(self.lengths[i] for i in movers), self.end)
            source, target = moved = tuple(to_device(torch.tensor([movers, holes]), self.mask.device))
            for x in self._tensors():
                x[target, ..., columns, :] = x[source, ..., columns, :]
            self.mask[target] = self.mask[source]
        for i, j in zip(movers, holes, strict=True):
            self.lengths[j] = self.lengths[i]
        del self.lengths[len(slots) :]
        self.first_is_old = True
        return moved

    def _move_columns(self, end: int) -> None:
        """Moves what the live slots hold so that it ends before column `end`."""
        longest, old = max(self.lengths, default=0), self.end
        assert longest <= end < self.num_columns
        for x in self._tensors() if self.live else ():
            x[: self.live, :, end - longest : end] = x[: self.live, :, old - longest : old].clone()
        mask = self.mask[: self.live, old - longest : old].clone()
        self.mask[: self.live] = True
        self.mask[: self.live, : end - longest] = False
        self.mask[: self.live, end - longest : end] = mask
        self.end, self.first_is_old = end, True

    def _tensors(self) -> list[torch.Tensor]:
        return [x for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values)]


class _SlotLayer(CacheLayerMixin):
    """One attention layer's keys and values, [slots, heads, columns, head size]."""

    is_compileable = True
    is_sliding = False

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = weakref.proxy(cache)  # no cycle: the memory is free as soon as decoding ends

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Zeros, as masked columns are multiplied by 0 and must be finite."""
        slots, columns = self.cache.num_slots, self.cache.num_columns
        self.keys, self.values = (
            x.new_zeros(slots, x.shape[1], columns, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Writes [rows, heads, new columns, head size]; returns what the forward's tokens may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            new = new if cache.sources is None else new.index_select(0, cache.sources)
            kept[cache.rows, :, cache.written] = new
        if cache.read is None:
            return key_states, value_states
        return self.keys[cache.rows, :, cache.read], self.values[cache.rows, :, cache.read]

    def get_seq_length(self) -> int:
        """Columns before the forward's own."""
        read = self.cache.read
        return 0 if read is None else read.stop - read.start - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns that are attended to, the first one's place)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Columns."""
        return self.cache.num_columns
