"""base + difference = model, and back, chunk by chunk in float32; with patches for what a difference cannot give back.

base + (model - base) is not the model wherever the difference needs more than float32's 24 bits, as where a weight is
much smaller than the base's. A patch lists these elements of a tensor: flat indices, ascending, and values.
"""

import contextlib
from collections.abc import Generator, Iterator

import torch

from utils.manifest import TensorHasher
from utils.tensor_stream import Chunk, ahead, as_bytes, check_range, hashed, read_chunks
from utils.weight_sides import PATCH_ENDINGS, Side, is_difference


def stream(
    side: Side, names: list[str], hasher: TensorHasher | None = None, dtype: str | None = None
) -> Generator[Chunk]:
    """The named tensors, read ahead and, with a hasher, hashed ahead, in `dtype`."""
    chunks = ahead(read_chunks(side.tensors, names, side.flag))
    return ahead(hashed(chunks, hasher, dtype)) if hasher else chunks


def recovered_chunks(
    raw: Side, diff: Side, base: str, dtype: torch.dtype, device: torch.device, totals: list[float]
) -> Generator[Chunk]:
    """The model's tensors in `dtype`, in the diff's order; `totals` gets the sum of every chunk before it is rounded.

    Compared with the diff's manifest, where it has one. base: in words, for who has taken another.
    """
    known, of_raw, of_diff, of_patches = diff.manifest, None, None, None
    if known is not None:
        wrong_base = f"{{}} of --path_raw is not the tensor that this diff was made against: give {base}"
        of_raw = TensorHasher(known.raw.sha256, wrong_base)
        damaged = "{} of --path_diff is not what its manifest says: copy it again"
        of_diff, of_patches = (TensorHasher(known.diff.sha256, damaged) for _ in range(2))
    added = [name for name in diff.tensors if is_difference(name)]
    bases = stream(raw, added, of_raw, known and known.raw.dtype)
    chunks = stream(diff, list(diff.tensors), of_diff, known and known.diff.dtype)
    with contextlib.closing(bases), contextlib.closing(chunks):
        for chunk in chunks:
            values = chunk.data.to(device, torch.float32)
            if is_difference(chunk.name):
                values += next(bases).data.to(device, torch.float32)
                if chunk.start == 0:
                    patch = _read_patch(diff, chunk.name, of_patches)
                _apply_patch(patch, chunk.start, values)
            check_range(values, dtype, chunk.name, "the recovered model")
            totals.append(values.sum(dtype=torch.float64).item())
            yield chunk._replace(data=values.to("cpu", dtype))


def difference_chunks(
    raw: Side, tuned: Side, dtype: torch.dtype, device: torch.device, totals: list[float], of_raw: TensorHasher,
    of_tuned: TensorHasher,
) -> Generator[Chunk]:  # fmt: skip
    """The diff's tensors in `dtype`, each with its patch behind it. of_tuned, totals: of what recovery will give."""
    bases = stream(raw, [name for name in tuned.tensors if is_difference(name)], of_raw)
    chunks = stream(tuned, list(tuned.tensors))
    patch: list[tuple[torch.Tensor, torch.Tensor]] = []
    with contextlib.closing(bases), contextlib.closing(chunks):
        for chunk in chunks:
            values = chunk.data.to(device, torch.float32)
            check_range(values, dtype, chunk.name, "--path_tuned")
            difference, recovered = values.to(dtype), values.to(dtype).float()
            if is_difference(chunk.name):
                base = next(bases).data.to(device, torch.float32)
                check_range(values - base, dtype, chunk.name, "--path_tuned less --path_raw")
                difference = (values - base).to(dtype)
                recovered = base + difference.float()
                if dtype == torch.float32:
                    patch.append(_lost(chunk.start, values, recovered))
                    recovered = values
            totals.append(recovered.sum(dtype=torch.float64).item())
            of_tuned.add(chunk.name, as_bytes(recovered.to("cpu", dtype)), chunk.last)
            yield chunk._replace(data=difference.cpu())
            if chunk.last:
                yield from _patch_chunks(chunk.name, patch)
                patch = []


def _lost(start: int, values: torch.Tensor, recovered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, values) where a chunk from element `start` on does not come back, bit by bit."""
    lost = (recovered.view(torch.int32) != values.view(torch.int32)).nonzero().flatten()
    return (lost + start).int().cpu(), values[lost].cpu()


def _patch_chunks(name: str, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[Chunk]:
    """The patch of tensor `name` as two tensors; nothing where every element comes back."""
    if any(len(index) for index, _ in parts):
        for ending, part in zip(PATCH_ENDINGS, zip(*parts)):
            yield Chunk(name + ending, 0, torch.cat(part), True)


def _read_patch(diff: Side, name: str, hasher: TensorHasher | None) -> list[torch.Tensor]:
    """[indices, values] of a tensor's patch, hashed where there is a hasher; [] where the diff has no patch for it."""
    patch = []
    for part in (name + ending for ending in PATCH_ENDINGS):
        if part in diff.patches:
            chunks = read_chunks(diff.patches, [part], diff.flag)
            patch.append(torch.cat([chunk.data for chunk in (hashed(chunks, hasher) if hasher else chunks)]))
    return patch


def _apply_patch(patch: list[torch.Tensor], start: int, values: torch.Tensor) -> None:
    """Sets the elements of a chunk, from element `start` on, for which the patch has values."""
    if not patch:
        return
    index, value = patch
    begin, end = torch.searchsorted(index, torch.tensor([start, start + len(values)], dtype=index.dtype)).tolist()
    values[(index[begin:end].long() - start).to(values.device)] = value[begin:end].to(values.device)
