"""Recovers, makes and verifies weight diffs: models published as their difference to LLaMA's weights.

A tensor whose name contains `layers` is a difference, to be added in float32 to the base's tensor of that name; all
others are whole, and may differ from the base's in shape. `make_diff` adds a manifest with the SHA-256 of every tensor
and, in float32, patches: flat indices, ascending, and values of elements that need more than 24 bits.
"""

import math
from collections.abc import Iterator

import torch
from tqdm import tqdm

from utils.errors import Say, UserError
from utils.files import first_names
from utils.weight_diff import model_files
from utils.weight_diff.manifest import Hashes, Manifest, TensorHasher, write_manifest
from utils.weight_diff.model_files import PATCH_ENDINGS, Side, ahead, check_pair, is_difference, open_side
from utils.weight_diff.output_folder import check_new_folder, new_folder, write_shards
from utils.weight_diff.published import Release, check_published, check_total, rotary_total, rounding_slack

CHUNK = 1 << 22  # elements in float32 at a time
SHARD = 2_000_000_000  # bytes of tensors per file, unless one tensor is larger
Named = tuple[str, torch.Tensor]


def recover(
    path_raw: str, path_diff: str, path_tuned: str, release: Release, model_type: str, dtype: str | None = None,
    max_shard_bytes: int = SHARD, check_sum: bool = True, say: Say = print,
) -> None:  # fmt: skip
    """Writes the model `path_tuned`: base `path_raw` + `path_diff`, rounded once to `dtype` (default: the diff's).

    Checks it against the diff's manifest; without one, and if `check_sum`, against the sum published for `model_type`.
    After an error or an interrupt there is no `path_tuned`.
    """
    check_new_folder(path_tuned, "--path_tuned", {"--path_raw": path_raw, "--path_diff": path_diff})
    raw, diff = open_side(path_raw, "--path_raw"), open_side(path_diff, "--path_diff")
    check_pair(raw, diff, model_type)
    config, dtype, known = model_files.read_config([diff, raw]), dtype or diff.dtype, diff.manifest
    if known is not None and known.raw is None:
        raise UserError(f"--path_diff {path_diff} is a recovered model by its manifest; use the folder of a diff")
    with new_folder(path_tuned, "--path_tuned", diff.nbytes(dtype)) as folder:
        model_files.write_model_files(folder, config, [diff, raw], dtype, release.template, say)
        totals: list[float] = []
        wrong = "{} of the recovered model differs from the manifest of --path_diff; copy both folders again"
        hasher = TensorHasher(known.tuned.sha256 if known and known.tuned.dtype == dtype else None, wrong)
        tensors = _recovered(raw, diff, release.base, getattr(torch, dtype), totals)
        write_shards(folder, ahead(hasher, tensors), max_shard_bytes)
        total = math.fsum(totals) + rotary_total(config)
        remedy = f"use {release.base} as --path_raw, or copy both again"
        if known is not None:
            check_total(total, known.total, "the manifest's", remedy)
            say(f"SHA-256 of every tensor, and the sum {total:.4f}: as in the manifest")
        elif check_sum:
            check_published(total, release, model_type, remedy, say)
        write_manifest(folder, Manifest(total, Hashes(dtype, hasher.found)))
    say(f"{path_tuned}: {len(diff.tensors)} tensors of {dtype}")


def make_diff(
    path_raw: str, path_diff: str, path_tuned: str, model_type: str, dtype: str | None = None,
    max_shard_bytes: int = SHARD, say: Say = print,
) -> None:  # fmt: skip
    """Writes the diff `path_diff`, from which `recover` turns `path_raw` into `path_tuned`, and its manifest.

    A float32 diff recovers every bit; a 16-bit diff a rounded model. Copies config and tokenizer unchanged.
    """
    check_new_folder(path_diff, "--path_diff", {"--path_raw": path_raw, "--path_tuned": path_tuned})
    raw, tuned = open_side(path_raw, "--path_raw"), open_side(path_tuned, "--path_tuned")
    check_pair(raw, tuned, model_type)
    config, dtype = model_files.read_config([tuned]), dtype or tuned.dtype
    with new_folder(path_diff, "--path_diff", tuned.nbytes(dtype)) as folder:
        model_files.copy_model_files(tuned.folder, folder)
        totals: list[float] = []
        of_raw, of_diff, of_tuned = TensorHasher(), TensorHasher(), TensorHasher()
        tensors = _differences(raw, tuned, getattr(torch, dtype), totals, of_raw, of_tuned)
        write_shards(folder, ahead(of_diff, tensors), max_shard_bytes)
        total = math.fsum(totals) + rotary_total(config)
        parts = Hashes(dtype, of_tuned.found), Hashes(raw.dtype, of_raw.found), Hashes(dtype, of_diff.found)
        write_manifest(folder, Manifest(total, *parts))
    say(f"{path_diff}: {len(tuned.tensors)} tensors of {dtype}")


def verify(path_tuned: str, release: Release, model_type: str | None = None, say: Say = print) -> None:
    """Checks a recovered model against its manifest and, without one or with `model_type`, the published sum."""
    side = open_side(path_tuned, "--path_tuned")
    config, known = model_files.read_config([side]), side.manifest
    hasher, dtype = None, side.dtype
    if known is not None:
        if known.raw is not None:
            raise UserError(f"--path_tuned {path_tuned} is a diff by its manifest; use a recovered model")
        hasher = TensorHasher(known.tuned.sha256, "{} of --path_tuned differs from its manifest; recover it again")
        dtype = known.tuned.dtype
        if lost := [name for name in known.tuned.sha256 if name not in side.tensors]:
            raise UserError(f"--path_tuned lacks {first_names(lost)}, which its manifest names; recover it again")
    totals, squares = [], []
    for name, tensor in tqdm(side.stream(list(side.tensors), hasher, dtype), total=len(side.tensors), disable=None):
        for values in (part.float() for part in tensor.split(CHUNK)):
            _check_range(values, torch.float32, name, "--path_tuned")
            totals.append(values.sum(dtype=torch.float64).item())
            squares.append(torch.dot(values, values).item())
    total = math.fsum(totals) + rotary_total(config)
    if known is not None:
        say(f"SHA-256 of every tensor: as in the manifest (the sum is {total:.4f})")
    if known is None or model_type is not None:
        slack = rounding_slack(side.dtype, math.fsum(squares))
        remedy = f"recover it again, from {release.base}"
        check_published(total, release, model_type or release.default_type, remedy, say, slack)


def _recovered(raw: Side, diff: Side, base: str, dtype: torch.dtype, totals: list[float]) -> Iterator[Named]:
    """Yields the model's tensors in `dtype`; adds sums before rounding to `totals`. base: name of the right base."""
    known, of_raw, of_diff, of_patches = diff.manifest, None, None, None
    if known is not None:
        wrong_base = f"{{}} of --path_raw is not the tensor that this diff was made against; use {base}"
        of_raw = TensorHasher(known.raw.sha256, wrong_base)
        damaged = "{} of --path_diff differs from its manifest; copy it again"
        of_diff, of_patches = (TensorHasher(known.diff.sha256, damaged) for _ in range(2))
    buffer = torch.empty(CHUNK)  # allocated once: allocating takes longer than adding
    bases = raw.stream(list(filter(is_difference, diff.tensors)), of_raw, known and known.raw.dtype)
    for name, tensor in diff.stream(list(diff.tensors), of_diff, known and known.diff.dtype):
        result = torch.empty(len(tensor), dtype=dtype)
        parts = [tensor.split(CHUNK), result.split(CHUNK)]
        if is_difference(name):
            parts.append(next(bases)[1].split(CHUNK))
        for difference, target, *base_part in zip(*parts):
            values = buffer[: len(difference)].copy_(difference)
            for x in base_part:
                values += x
            _check_range(values, dtype, name, "the recovered model")
            totals.append(values.sum().item())
            target.copy_(values)
        _apply_patch(diff, name, result, of_patches)
        yield name, result.reshape(diff.tensors[name].shape)


def _differences(
    raw: Side, tuned: Side, dtype: torch.dtype, totals: list[float], of_raw: TensorHasher, of_tuned: TensorHasher
) -> Iterator[Named]:
    """Yields the diff's tensors in `dtype`, each followed by its patch. of_tuned, totals: of the recovered model."""
    bases = raw.stream(list(filter(is_difference, tuned.tensors)), of_raw)
    for name, tensor in tuned.stream(list(tuned.tensors)):
        base = next(bases)[1] if is_difference(name) else None
        difference, again = (torch.empty(len(tensor), dtype=dtype) for _ in range(2))
        patch: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start in range(0, len(tensor), CHUNK):
            part = slice(start, start + CHUNK)
            values = tensor[part].float()
            _check_range(values, dtype, name, "--path_tuned")
            less, recovered = values.to(dtype), values.to(dtype).float()
            if base is not None:
                bare = base[part].float()
                _check_range(values - bare, dtype, name, "--path_tuned less --path_raw")
                less = (values - bare).to(dtype)
                recovered = bare + less.float()
                if dtype == torch.float32:
                    lost = (recovered.view(torch.int32) != values.view(torch.int32)).nonzero().flatten()
                    patch.append(((lost + start).int(), values[lost]))
                    recovered = values
            totals.append(recovered.sum(dtype=torch.float64).item())
            difference[part], again[part] = less, recovered.to(dtype)
        of_tuned((name, again))
        yield name, difference.reshape(tuned.tensors[name].shape)
        if any(len(index) for index, _ in patch):
            yield from ((name + ending, torch.cat(part)) for ending, part in zip(PATCH_ENDINGS, zip(*patch)))


def _apply_patch(diff: Side, name: str, result: torch.Tensor, hasher: TensorHasher | None) -> None:
    """Sets the elements of a tensor to those of its patch, if it has one. Raises UserError if the patch is damaged."""
    names = [name + ending for ending in PATCH_ENDINGS]
    if not any(part in diff.patches for part in names):
        return
    if all(part in diff.patches for part in names):
        index, value = (diff.read(part) for part in names)
        for part in zip(names, (index, value)) if hasher else ():
            hasher(part)
        kinds = (index.dtype, value.dtype) == (torch.int32, torch.float32) and len(index) == len(value) > 0
        if kinds and index[0] >= 0 and index[-1] < len(result) and bool((index.diff() > 0).all()):
            _check_range(value, result.dtype, name, "--path_diff")
            result[index.long()] = value.to(result.dtype)
            return
    raise UserError(f"{diff.flag}: the patch of {name} is damaged; copy the diff again")


def _check_range(values: torch.Tensor, dtype: torch.dtype, name: str, where: str) -> None:
    """Raises UserError if float32 values of tensor `name` of `where` are not finite, or beyond the range of `dtype`."""
    low, high = (bound.item() for bound in torch.aminmax(values))  # both are NaN if any value is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name} of {where} holds NaN or Inf; the files are damaged, copy them again")
    if max(-low, high) > torch.finfo(dtype).max:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} of {where} has values beyond the range of {kind}; pass --dtype float32")
