"""A preallocated key-value cache with one slot per sequence; a new response reuses the slot of one that has ended.

All slots write the same column at each step, so their tokens end at the same column: to a model the cache looks like a
left-padded batch. So sliding windows, ALiBi and learned positions work.
"""

import weakref

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from utils.tensors import to_device


def columns_for(tokens: int) -> int:
    """Returns the number of columns for sequences of this many tokens: an eighth more, so that columns rarely move."""
    return tokens + max(16, tokens // 8)


def slots_for(wanted: int, columns: int, cache_tokens: int) -> int:
    """Returns how many of the wanted slots fit in a cache of this many tokens (0: no limit); at least 1."""
    return max(1, min(wanted, cache_tokens // columns)) if cache_tokens else wanted


AUTO_SLOTS = 32  # for --rollout_batch_size auto where free memory is not known, such as on a CPU


def slots_in(free: int, slot: int, prompts: int) -> int:
    """Returns how many slots of `slot` bytes fit in `free` bytes: 1 to one per prompt; multiples of 4 from 4 on."""
    fitting = max(1, free // slot)
    return min(prompts, fitting if fitting < 4 else fitting // 4 * 4)


class SlotCache(Cache):
    """Keys and values of `num_slots` sequences, allocated at the first forward.

    The first `live` slots are in use. Slot i holds the `lengths[i]` columns before column `end`; `mask` [num_slots,
    num_columns] is True from its first column on. Before each forward, call `append` for new prompts or `advance` for
    one more token per live slot. For kernels, `newest` is the column of the newest tokens after `advance`, and `first`
    [num_slots] the first column of each slot, greater than `newest` where the slot is not in use.
    """

    is_compileable = True  # transformers then makes every mask without a copy from the device to check if it is needed

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
        """Stores a forward's keys and values, and returns those that its tokens attend to. Called by each layer."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_SlotLayer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    @property
    def live(self) -> int:
        """Number of slots in use."""
        return len(self.lengths)

    def append(self, mask: torch.Tensor, lengths: list[int], sources: torch.Tensor | None) -> None:
        """Adds slots for left-padded prompts. mask: [prompts, width]; lengths: tokens of each prompt.

        sources: [prompts], the row of the forward for each prompt; None: one row each.
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
        """Adds a column. Returns the mask, [live, columns from the longest slot's first token on]."""
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
        """Frees all other slots, and moves the last of those kept to free places. Returns (from, to) if any moved."""
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
        """Moves the columns of the live slots so that they end before column `end`."""
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
        self.cache = weakref.proxy(cache)  # no reference cycle, so the memory is freed as soon as decoding ends

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates zeros: masked columns are multiplied by 0 and have to be finite."""
        slots, width = self.cache.num_slots, self.cache.num_columns
        self.keys, self.values = (x.new_zeros(slots, x.shape[1], width, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Writes [rows, heads, new columns, head size]; returns the keys and values that the tokens attend to."""
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
        """Number of columns before those of this forward."""
        read = self.cache.read
        return 0 if read is None else read.stop - read.start - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns (number of columns attended to, index of the first)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Number of columns."""
        return self.cache.num_columns
