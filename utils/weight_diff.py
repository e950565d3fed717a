"""Weight diffs: a model published as its difference to LLaMA's weights; undone, made and verified tensor by tensor.

The published layout: a tensor whose name contains `layers` is a difference, to be added in float32 to the base's tensor
of that name; all others (embed_tokens, the final norm, lm_head, reward_head) are whole, in shapes of their own.
`make_diff` adds what other tools pass over: a manifest with the SHA-256 of every tensor, and, in float32, patches: the
elements that a rounded difference cannot give back, with their values, so that recovery is exact.

Nothing is ever whole in memory: threads read, hash, add and write, a few chunks of four million elements apart.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from utils.companions import copy_companions, read_config, rotary_total, write_companions
from utils.errors import UserError
from utils.manifest import Hashes, Manifest, TensorHasher, write_manifest
from utils.new_folder import check_new_folder, check_space, new_folder
from utils.pickled_tensors import ITEM_BYTES
from utils.release import Output, Release
from utils.shards import ShardWriter
from utils.tensor_files import first_names
from utils.tensor_stream import Chunk, ahead, as_bytes, check_range, hashed
from utils.weight_arithmetic import difference_chunks, recovered_chunks, stream
from utils.weight_sides import PATCH_ENDINGS, Side, check_model_type, check_pair, is_difference, open_side

TOLERANCE = 1e-5  # relative, of a sum
Say = Callable[[str], None]


def recover(
    path_raw: str, path_diff: str, path_tuned: str, release: Release, model_type: str, output: Output,
    check_sum: bool = True, say: Say = print,
) -> None:  # fmt: skip
    """Writes the model `path_tuned`: base `path_raw` + `path_diff`, rounded once, to the output's dtype.

    Checked against the diff's manifest; without one against the sum published for `model_type`, unless not `check_sum`.
    Raises UserError for whatever is wrong with inputs or result. Then, as after an interrupt, there is no `path_tuned`.
    """
    check_new_folder(path_tuned, "--path_tuned", {"--path_raw": path_raw, "--path_diff": path_diff})
    device = _device(output)
    raw, diff = open_side(path_raw, "--path_raw"), open_side(path_diff, "--path_diff")
    check_pair(raw, diff)
    check_model_type(diff, model_type)
    config, dtype, known = read_config([diff, raw]), output.dtype or diff.dtype, diff.manifest
    if known is not None and known.raw is None:
        raise UserError(
            f"--path_diff {path_diff} is a recovered model, as its manifest says: give the folder of a diff"
        )
    check_space(path_tuned, "--path_tuned", _size(diff, dtype))
    with new_folder(path_tuned, "--path_tuned") as folder:
        write_companions(folder, config, [diff, raw], diff, dtype, release.template, say)
        totals: list[float] = []
        expected = known.tuned.sha256 if known is not None and known.tuned.dtype == dtype else None
        hasher = TensorHasher(
            expected, "{} came out other than the manifest of --path_diff says: copy both folders again"
        )
        tensors = ahead(recovered_chunks(raw, diff, release.base, getattr(torch, dtype), device, totals))
        _write(ahead(hashed(tensors, hasher)), diff, dtype, folder, output)
        total = math.fsum(totals) + rotary_total(config)
        remedy = f"give {release.base} as --path_raw, or copy both again"
        if known is not None:
            _check_total(total, known.total, "the manifest's", remedy)
            say(f"SHA-256 of every tensor, and the sum {total:.4f}: as in the manifest")
        elif check_sum:
            _check_published(total, release, model_type, remedy, say)
        write_manifest(folder, Manifest(total, Hashes(dtype, hasher.found)))
    say(f"{path_tuned}: {len(diff.tensors)} tensors of {dtype}")


def make_diff(
    path_raw: str, path_diff: str, path_tuned: str, model_type: str, output: Output, say: Say = print
) -> None:
    """Writes the diff `path_diff` with which `recover` turns `path_raw` into `path_tuned`, and its manifest.

    In float32 it recovers every bit; in 16 bits difference and result are rounded, so that what comes back differs by
    a rounding, and the manifest is of that. Config and tokenizer are copied as they are. Raises UserError as `recover`.
    """
    check_new_folder(path_diff, "--path_diff", {"--path_raw": path_raw, "--path_tuned": path_tuned})
    device = _device(output)
    raw, tuned = open_side(path_raw, "--path_raw"), open_side(path_tuned, "--path_tuned")
    check_pair(raw, tuned)
    check_model_type(tuned, model_type)
    config, dtype = read_config([tuned]), output.dtype or tuned.dtype
    check_space(path_diff, "--path_diff", _size(tuned, dtype))
    with new_folder(path_diff, "--path_diff") as folder:
        copy_companions(tuned.folder, folder)
        totals: list[float] = []
        of_raw, of_diff, of_tuned = TensorHasher(), TensorHasher(), TensorHasher()
        tensors = ahead(difference_chunks(raw, tuned, getattr(torch, dtype), device, totals, of_raw, of_tuned))
        _write(ahead(hashed(tensors, of_diff)), tuned, dtype, folder, output)
        whole = [name for name in raw.tensors if not is_difference(name)]
        for _ in stream(raw, whole, of_raw):  # recovery does without them; they are for the record
            pass
        total = math.fsum(totals) + rotary_total(config)
        hashes = {"raw": Hashes(raw.dtype, of_raw.found), "diff": Hashes(dtype, of_diff.found)}
        write_manifest(folder, Manifest(total, Hashes(dtype, of_tuned.found), **hashes))
    say(f"{path_diff}: {len(tuned.tensors)} tensors of {dtype}")


def verify(path_tuned: str, release: Release, model_type: str | None, threads: int, say: Say = print) -> None:
    """Checks a recovered model: every tensor against its manifest, the sum against that published for `model_type`.

    model_type: None asks for no published sum where there is a manifest. Raises UserError when something differs.
    """
    torch.set_num_threads(threads)
    side = open_side(path_tuned, "--path_tuned")
    config, known = read_config([side]), side.manifest
    hasher, dtype = None, side.dtype
    if known is not None:
        if known.raw is not None:
            raise UserError(f"--path_tuned {path_tuned} is a diff, as its manifest says: give a recovered model")
        hasher = TensorHasher(known.tuned.sha256, "{} of --path_tuned is not what its manifest says: recover it again")
        dtype = known.tuned.dtype
        if lost := [name for name in known.tuned.sha256 if name not in side.tensors]:
            raise UserError(f"--path_tuned lacks {first_names(lost)}, which its manifest names: recover it again")
    totals, squares = [], []
    with contextlib.closing(stream(side, list(side.tensors), hasher, dtype)) as chunks:
        for chunk in _with_progress(chunks, _size(side, dtype)):
            values = chunk.data.float()
            check_range(values, torch.float32, chunk.name, "--path_tuned")
            totals.append(values.sum(dtype=torch.float64).item())
            squares.append(torch.dot(values, values).item())
    total = math.fsum(totals) + rotary_total(config)
    remedy = f"recover it again, from {release.base}"
    if known is not None:
        say(f"SHA-256 of every tensor: as in the manifest (the sum is {total:.4f})")
    if known is None or model_type is not None:
        slack = _rounding(side.dtype, math.fsum(squares))
        _check_published(total, release, model_type or release.default_type, remedy, say, slack)


def _rounding(dtype: str, squares: float) -> float:
    """What the rounding of all values may have done to their sum, as four standard deviations; 0 in float32.

    A rounded value is off by up to half a step, evenly spread and each for itself: its variance is step^2 / 12, and a
    step is at most eps times the value. Published sums are of the values before rounding. squares: the squared values'.
    """
    return 0.0 if dtype == "float32" else 4 * torch.finfo(getattr(torch, dtype)).eps * math.sqrt(squares / 12)


def _check_published(
    total: float, release: Release, model_type: str | None, remedy: str, say: Say, slack: float = 0.0
) -> None:
    if model_type is None:
        raise UserError("--path_tuned has no manifest: give --model_type, to check the sum published for it")
    if release.totals[model_type] is None:
        say(f"no sum is published for --model_type {model_type}: not checked (the sum is {total:.4f})")
        return
    what = f"that published for --model_type {model_type}"
    _check_total(total, release.totals[model_type], what, remedy, slack)
    say(f"sum {total:.4f}: as published for --model_type {model_type}")


def _check_total(total: float, expected: float, what: str, remedy: str, slack: float = 0.0) -> None:
    if abs(total - expected) > TOLERANCE * abs(expected) + slack:
        raise UserError(f"the sum of all tensors is {total:.4f}, {what} is {expected:.4f}: {remedy}")


def _write(chunks: Generator[Chunk], side: Side, dtype: str, folder: Path, output: Output) -> None:
    """Writes the chunks as shards. side: has their shapes; what it does not know is a patch, in one chunk."""
    names = [name + ending for name in side.tensors for ending in ("", *PATCH_ENDINGS)]
    with contextlib.closing(chunks), ShardWriter(folder, output.max_shard_bytes, names) as writer:
        for chunk in _with_progress(chunks, _size(side, dtype)):
            if chunk.start == 0:
                shape = side.tensors[chunk.name].shape if chunk.name in side.tensors else tuple(chunk.data.shape)
                kind = str(chunk.data.dtype).removeprefix("torch.")
                writer.start(chunk.name, kind, shape, math.prod(shape) * ITEM_BYTES[kind])
            writer.write(as_bytes(chunk.data))
        writer.finish()


def _with_progress(chunks: Iterator[Chunk], total: int) -> Iterator[Chunk]:
    """The chunks, with a bar of `total` bytes on a terminal."""
    form = "{percentage:3.0f}%|{bar}| {n:.2f} of {total:.2f} GB, {rate_fmt} [{elapsed}<{remaining}]"
    with tqdm(total=total, unit="GB", unit_scale=1e-9, bar_format=form, disable=None) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(chunk.data.nbytes)


def _size(side: Side, dtype: str) -> int:
    """Bytes of the side's parameters in `dtype`."""
    return sum(place.numel for place in side.tensors.values()) * ITEM_BYTES[dtype]


def _device(output: Output) -> torch.device:
    torch.set_num_threads(output.threads)
    device = torch.device(output.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {output.device}: there is no such GPU; leave it out to add on the CPU")
    return device
