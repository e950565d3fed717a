"""Triton kernels for the attention of one new token per slot, on a GPU, where each slot reads only its own columns.

With PyTorch's kernels and a mask, every slot reads as many columns as the longest; flash kernels do not support masks.
Column numbers are read from device memory, so that a CUDA graph of these kernels stays valid for the next token.
Importing this module needs Triton.
"""

import torch
import triton
import triton.language as tl

SIZES = (16, 32, 64, 128, 256)  # head sizes that are supported: Triton's blocks are powers of two
PROGRAMS = 8  # per multiprocessor, so that slots of different lengths keep all of them busy
MAX_SPLITS = 64
LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)  # in place of log(0), as the difference of two infinities is NaN


def append_rotated(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor, end: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Returns the rotated query [slots, heads, size]; writes rotated key and value into column `end` of the cache.

    key, value: [slots, key-value heads, size]; cos, sin: [slots, 1, size], their halves equal; keys, values: [slots or
    more, key-value heads, columns, size]; end: int32 on the device. Computed in float32, rounded once.
    """
    query, key, value, cos, sin = (x.contiguous() for x in (query, key, value, cos, sin))
    assert keys.is_contiguous() and values.is_contiguous()
    (slots, heads, size), shared, rotated = query.shape, key.shape[1], torch.empty_like(query)
    _append_rotated[slots, heads + shared](
        query, key, value, cos, sin, keys, values, end, rotated, keys.shape[2], heads, shared, SIZE=size, num_warps=1
    )
    return rotated


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, end: torch.Tensor,
    scaling: float, splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Returns the attention of one token per slot over its columns from `first` to `end`: [slots, heads, size].

    query: [slots, heads, size]; keys, values: as in `append_rotated`; first: int32 [slots] and end: int32, on the
    device. A slot whose first column is greater than `end` reads column `end`. splits: parts of each slot's columns,
    which are read in parallel; None: as many as keep the device busy. Deterministic.
    """
    query = query.contiguous()
    assert keys.is_contiguous() and values.is_contiguous()
    (slots, heads, size), (_, shared, columns, _) = query.shape, keys.shape
    block = _block(size, keys.element_size(), heads // shared)
    if splits is None:
        splits = _splits(slots * shared, columns, block, query.device)
    sizes = {"GROUP": heads // shared, "SIZE": size, "BLOCK": block}
    output = torch.empty_like(query)
    parts = query.new_empty(slots, heads, splits, size, dtype=torch.float32) if splits > 1 else output
    weights = query.new_empty(slots, heads, splits, dtype=torch.float32)
    kernel = _attend_alone if heads == shared else _attend_group
    kernel[slots, shared, splits](
        query, keys, values, first, end, parts, weights, scaling, columns,
        **sizes, PADDED=max(16, triton.next_power_of_2(heads // shared)), num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _combine[slots, heads](
            parts, weights, first, end, output, splits,
            SPLITS=triton.next_power_of_2(splits), SIZE=size, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return output


def _block(size: int, element: int, group: int) -> int:
    """Returns the columns that a program reads at once, limited by registers and shared memory."""
    return max(16, min(128, (16384 if group > 1 and element == 2 else 8192) // (size * element)))


def _splits(programs: int, columns: int, block: int, device: torch.device) -> int:
    """Returns how many programs share a slot's columns; each has at least two blocks of a full slot."""
    cuda = device.type == "cuda"  # Triton's interpreter, on a CPU, runs one program at a time
    wanted = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    return max(1, min(MAX_SPLITS, -(-wanted // programs), columns // (2 * block)))


@triton.jit
def _append_rotated(
    query, key, value, cos, sin, keys, values, end, rotated, columns, heads, shared, SIZE: tl.constexpr
):  # fmt: skip
    """Rotates one query head of one slot, or stores one rotated key head and its value."""
    slot, head = tl.program_id(0), tl.program_id(1)
    low = tl.arange(0, SIZE // 2)
    high = low + SIZE // 2
    cosine = tl.load(cos + slot * SIZE + low).to(tl.float32)
    sine = tl.load(sin + slot * SIZE + low).to(tl.float32)
    if head < heads:
        source = query + (slot * heads + head) * SIZE
        target = rotated + (slot * heads + head) * SIZE
    else:
        row = slot * shared + head - heads
        place = (row.to(tl.int64) * columns + tl.load(end)) * SIZE
        source, target = key + row * SIZE, keys + place
        tl.store(values + place + low, tl.load(value + row * SIZE + low))
        tl.store(values + place + high, tl.load(value + row * SIZE + high))
    first = tl.load(source + low).to(tl.float32)
    second = tl.load(source + high).to(tl.float32)
    tl.store(target + low, first * cosine - second * sine)
    tl.store(target + high, second * cosine + first * sine)


@triton.jit
def _part(first, end, slot, split, splits, BLOCK: tl.constexpr):
    """Returns (first column, last column + 1) of a part of a slot's columns: whole blocks; last parts may be empty."""
    stop = tl.load(end) + 1
    start = tl.minimum(tl.load(first + slot), stop - 1)
    part = tl.cdiv(tl.cdiv(stop - start, splits), BLOCK) * BLOCK
    start += split * part
    return start, tl.minimum(stop, start + part)


@triton.jit
def _attend_alone(
    query, keys, values, first, end, parts, weights, scaling, columns, GROUP: tl.constexpr, PADDED: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attends with one query head that has its own keys to one part of a slot's columns (online softmax, float32).

    Writes the part's output and the base-2 logarithm of its sum of exponentials; nothing for an empty part. Each row of
    a block has its own maximum and sums, so that threads exchange data only at the end.
    """
    slot, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, splits = slot * tl.num_programs(1) + head, tl.num_programs(2)
    start, stop = _part(first, end, slot, split, splits, BLOCK)
    if start < stop:
        sizes, block = tl.arange(0, SIZE), tl.arange(0, BLOCK)
        places = row.to(tl.int64) * columns * SIZE + block[:, None] * SIZE + sizes[None, :]
        own = tl.load(query + row * SIZE + sizes).to(tl.float32) * (scaling * LOG2_E)
        highest = tl.full([BLOCK], NOTHING, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        sums = tl.zeros([BLOCK, SIZE], tl.float32)
        for column in tl.range(start, stop, BLOCK, num_stages=3):
            held = column + block < stop
            key = tl.load(keys + places + column * SIZE, mask=held[:, None], other=0.0).to(tl.float32)
            value = tl.load(values + places + column * SIZE, mask=held[:, None], other=0.0).to(tl.float32)
            score = tl.where(held, tl.sum(key * own[None, :], 1), -float("inf"))
            higher = tl.maximum(highest, score)
            shrink, weight = tl.exp2(highest - higher), tl.exp2(score - higher)
            total = total * shrink + weight
            sums = sums * shrink[:, None] + weight[:, None] * value
            highest = higher
        top = tl.max(highest, 0)
        weight = tl.exp2(highest - top)
        all_total = tl.sum(total * weight, 0)
        tl.store(parts + (row * splits + split) * SIZE + sizes, tl.sum(sums * weight[:, None], 0) / all_total)
        tl.store(weights + row * splits + split, top + tl.log2(all_total))


@triton.jit
def _attend_group(
    query, keys, values, first, end, parts, weights, scaling, columns, GROUP: tl.constexpr, PADDED: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Does what `_attend_alone` does for query heads that share keys: rows of one product, PADDED for tensor cores."""
    slot, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, splits = slot * tl.num_programs(1) + head, tl.num_programs(2)
    start, stop = _part(first, end, slot, split, splits, BLOCK)
    if start < stop:
        sizes, block, group = tl.arange(0, SIZE), tl.arange(0, BLOCK), tl.arange(0, PADDED)
        places = row.to(tl.int64) * columns * SIZE + block[:, None] * SIZE + sizes[None, :]
        heads, real = row * GROUP + group, group < GROUP
        own = tl.load(query + heads[:, None] * SIZE + sizes[None, :], mask=real[:, None], other=0.0)
        highest = tl.full([PADDED], NOTHING, tl.float32)
        total = tl.zeros([PADDED], tl.float32)
        sums = tl.zeros([PADDED, SIZE], tl.float32)
        for column in tl.range(start, stop, BLOCK, num_stages=3):
            held = column + block < stop
            key = tl.load(keys + places + column * SIZE, mask=held[:, None], other=0.0)
            value = tl.load(values + places + column * SIZE, mask=held[:, None], other=0.0)
            score = tl.dot(own, tl.trans(key), input_precision="ieee") * (scaling * LOG2_E)
            score = tl.where(held[None, :], score, -float("inf"))
            higher = tl.maximum(highest, tl.max(score, 1))
            shrink, weight = tl.exp2(highest - higher), tl.exp2(score - higher[:, None])
            total = total * shrink + tl.sum(weight, 1)
            product = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            sums = sums * shrink[:, None] + product
            highest = higher
        rows = heads * splits + split
        tl.store(parts + rows[:, None] * SIZE + sizes[None, :], sums / total[:, None], mask=real[:, None])
        tl.store(weights + rows, highest + tl.log2(total), mask=real)


@triton.jit
def _combine(
    parts, weights, first, end, output, splits, SPLITS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Combines the parts' outputs of one head of one slot, weighted by their shares of the sum of exponentials."""
    slot, heads = tl.program_id(0), tl.num_programs(1)
    row = slot * heads + tl.program_id(1)
    split, sizes = tl.arange(0, SPLITS), tl.arange(0, SIZE)
    start, stop = _part(first, end, slot, split, splits, BLOCK)
    filled = start < stop
    weight = tl.load(weights + row * splits + split, mask=filled, other=-float("inf"))
    weight = tl.exp2(weight - tl.max(weight, 0))
    places = (row * splits + split)[:, None] * SIZE + sizes[None, :]
    outputs = tl.load(parts + places, mask=filled[:, None], other=0.0)
    tl.store(output + row * SIZE + sizes, tl.sum(outputs * weight[:, None], 0) / tl.sum(weight, 0))
