"""Weight diffs: a model published as its difference to LLaMA's weights; undone, made and verified tensor by tensor.

The published layout: a tensor whose name contains `layers` is a difference, to be added in float32 to the base's tensor
of that name; all others (embed_tokens, the final norm, lm_head, reward_head) are whole, in shapes of their own.
`make_diff` adds a manifest with the SHA-256 of every tensor and, in float32, patches: base + (model - base) is not the
model wherever the difference needs more than float32's 24 bits. A patch lists these elements of a tensor: flat indices,
ascending, and values.
"""

import math
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.files import first_names
from utils.weight_diff import model_files
from utils.weight_diff.manifest import Hashes, Manifest, TensorHasher, write_manifest
from utils.weight_diff.model_files import PATCH_ENDINGS, Side, ahead, check_pair, is_difference, open_side
from utils.weight_diff.output_folder import check_new_folder, check_space, new_folder, write_shards
from utils.weight_diff.published import Output, Release, check_published, check_total, rotary_total, rounding_slack

CHUNK = 1 << 22  # elements that are in float32 at a time
Say = Callable[[str], None]
Named = tuple[str, torch.Tensor]


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
    check_pair(raw, diff, model_type)
    config, dtype, known = model_files.read_config([diff, raw]), output.dtype or diff.dtype, diff.manifest
    if known is not None and known.raw is None:
        raise UserError(
            f"--path_diff {path_diff} is a recovered model, as its manifest says: give the folder of a diff"
        )
    check_space(path_tuned, "--path_tuned", diff.nbytes(dtype))
    with new_folder(path_tuned, "--path_tuned") as folder:
        model_files.write_model_files(folder, config, [diff, raw], dtype, release.template, say)
        totals: list[float] = []
        expected = known.tuned.sha256 if known is not None and known.tuned.dtype == dtype else None
        hasher = TensorHasher(
            expected, "{} came out other than the manifest of --path_diff says: copy both folders again"
        )
        tensors = ahead(hasher, _recovered(raw, diff, release.base, getattr(torch, dtype), device, totals))
        write_shards(folder, tensors, output.max_shard_bytes)
        total = math.fsum(totals) + rotary_total(config)
        remedy = f"give {release.base} as --path_raw, or copy both again"
        if known is not None:
            check_total(total, known.total, "the manifest's", remedy)
            say(f"SHA-256 of every tensor, and the sum {total:.4f}: as in the manifest")
        elif check_sum:
            check_published(total, release, model_type, remedy, say)
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
    check_pair(raw, tuned, model_type)
    config, dtype = model_files.read_config([tuned]), output.dtype or tuned.dtype
    check_space(path_diff, "--path_diff", tuned.nbytes(dtype))
    with new_folder(path_diff, "--path_diff") as folder:
        model_files.copy_model_files(tuned.folder, folder)
        totals: list[float] = []
        of_raw, of_diff, of_tuned = TensorHasher(), TensorHasher(), TensorHasher()
        tensors = ahead(of_diff, _differences(raw, tuned, getattr(torch, dtype), device, totals, of_raw, of_tuned))
        write_shards(folder, tensors, output.max_shard_bytes)
        for _ in raw.stream([name for name in raw.tensors if not is_difference(name)], of_raw):
            pass  # recovery does without them; they are for the record
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
    config, known = model_files.read_config([side]), side.manifest
    hasher, dtype = None, side.dtype
    if known is not None:
        if known.raw is not None:
            raise UserError(f"--path_tuned {path_tuned} is a diff, as its manifest says: give a recovered model")
        hasher = TensorHasher(known.tuned.sha256, "{} of --path_tuned is not what its manifest says: recover it again")
        dtype = known.tuned.dtype
        if lost := [name for name in known.tuned.sha256 if name not in side.tensors]:
            raise UserError(f"--path_tuned lacks {first_names(lost)}, which its manifest names: recover it again")
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


def _recovered(
    raw: Side, diff: Side, base: str, dtype: torch.dtype, device: torch.device, totals: list[float]
) -> Iterator[Named]:
    """Yields the model's tensors in `dtype`, in the diff's order; `totals` gets sums of parts before they are rounded.

    Compared with the diff's manifest, where it has one. base: in words, for who has taken another.
    """
    known, of_raw, of_diff, of_patches = diff.manifest, None, None, None
    if known is not None:
        wrong_base = f"{{}} of --path_raw is not the tensor that this diff was made against: give {base}"
        of_raw = TensorHasher(known.raw.sha256, wrong_base)
        damaged = "{} of --path_diff is not what its manifest says: copy it again"
        of_diff, of_patches = (TensorHasher(known.diff.sha256, damaged) for _ in range(2))
    buffers = torch.empty(2, CHUNK, device=device)  # allocated once: new memory costs more than the sum
    bases = raw.stream(list(filter(is_difference, diff.tensors)), of_raw, known and known.raw.dtype)
    for name, tensor in diff.stream(list(diff.tensors), of_diff, known and known.diff.dtype):
        base, patch = None, None
        if is_difference(name):
            base, patch = next(bases)[1], _read_patch(diff, name, len(tensor), of_patches)
        result = torch.empty(len(tensor), dtype=dtype)
        for start in range(0, len(tensor), CHUNK):
            part = slice(start, start + CHUNK)
            values = buffers[0, : len(tensor[part])].copy_(tensor[part])
            if base is not None:
                values += buffers[1, : len(values)].copy_(base[part])
            if patch is not None:
                _apply_patch(*patch, start, values)
            _check_range(values, dtype, name, "the recovered model")
            totals.append(values.sum().item())
            result[part] = values
        yield name, result.reshape(diff.tensors[name].shape)


def _differences(
    raw: Side, tuned: Side, dtype: torch.dtype, device: torch.device, totals: list[float], of_raw: TensorHasher,
    of_tuned: TensorHasher,
) -> Iterator[Named]:  # fmt: skip
    """Yields the diff's tensors in `dtype`, each with its patch after it. of_tuned, totals: of what recovery gives."""
    bases = raw.stream(list(filter(is_difference, tuned.tensors)), of_raw)
    for name, tensor in tuned.stream(list(tuned.tensors)):
        base = next(bases)[1] if is_difference(name) else None
        difference, again = (torch.empty(len(tensor), dtype=dtype) for _ in range(2))
        patch: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start in range(0, len(tensor), CHUNK):
            part = slice(start, start + CHUNK)
            values = tensor[part].to(device, torch.float32)
            _check_range(values, dtype, name, "--path_tuned")
            less, recovered = values.to(dtype), values.to(dtype).float()
            if base is not None:
                bare = base[part].to(device, torch.float32)
                _check_range(values - bare, dtype, name, "--path_tuned less --path_raw")
                less = (values - bare).to(dtype)
                recovered = bare + less.float()
                if dtype == torch.float32:
                    lost = (recovered.view(torch.int32) != values.view(torch.int32)).nonzero().flatten()
                    patch.append(((lost + start).int().cpu(), values[lost].cpu()))
                    recovered = values
            totals.append(recovered.sum(dtype=torch.float64).item())
            difference[part], again[part] = less, recovered.to(dtype)
        of_tuned((name, again))
        yield name, difference.reshape(tuned.tensors[name].shape)
        if any(len(index) for index, _ in patch):
            yield from ((name + ending, torch.cat(part)) for ending, part in zip(PATCH_ENDINGS, zip(*patch)))


def _read_patch(
    diff: Side, name: str, numel: int, hasher: TensorHasher | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(indices, values) of a tensor's patch, hashed where there is a hasher. UserError for what is no patch."""
    names = [name + ending for ending in PATCH_ENDINGS]
    if not any(part in diff.patches for part in names):
        return None
    if all(part in diff.patches for part in names):
        index, value = (diff.read(part) for part in names)
        for part in zip(names, (index, value)) if hasher else ():
            hasher(part)
        kinds = (index.dtype, value.dtype) == (torch.int32, torch.float32) and len(index) == len(value) > 0
        if kinds and index[0] >= 0 and index[-1] < numel and bool((index.diff() > 0).all()):
            return index, value
    raise UserError(f"{diff.flag}: the patch of {name} is damaged; copy the diff again")


def _apply_patch(index: torch.Tensor, value: torch.Tensor, start: int, values: torch.Tensor) -> None:
    """Sets the elements of a part, from element `start` on, for which the patch has values."""
    begin, end = torch.searchsorted(index, torch.tensor([start, start + len(values)], dtype=index.dtype)).tolist()
    values[(index[begin:end].long() - start).to(values.device)] = value[begin:end].to(values.device)


def _check_range(values: torch.Tensor, dtype: torch.dtype, name: str, where: str) -> None:
    """Raises UserError when float32 values of tensor `name` are not finite, or would not be in `dtype`.

    where: whose tensor it is, for the message.
    """
    low, high = (bound.item() for bound in torch.aminmax(values))  # both NaN where one value is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name} of {where} holds NaN or Inf: the files are damaged, copy them again")
    if max(-low, high) > torch.finfo(dtype).max:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} of {where} has values beyond the range of {kind}: give --dtype float32")


def _device(output: Output) -> torch.device:
    torch.set_num_threads(output.threads)
    device = torch.device(output.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {output.device}: there is no such GPU; leave it out to add on the CPU")
    return device
