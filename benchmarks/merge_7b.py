"""Measure time and memory of recovering a 7B model:   python benchmarks/merge_7b.py [--layers 8 16 32]

Writes a float16 base and model with LLaMA-7B's shapes (random weights, 32 layers by default), makes the diff, and
times, each in its own process and with its inputs dropped from the page cache:

  cp            copy the base to the disk and the diff to /dev/null: the same reads and writes as recover
  cp, synced    the same until the copy is on the disk, as recover does
  recover       with a manifest: SHA-256 of base, diff and result
  published     without a manifest, like the published diffs: SHA-256 of the result
  verify        of the recovered model

Prints one line per size: medians over the repeats, peak resident memory (with mapped files and imports) and the ratio
to cp. Needs up to 54 GB of disk for 7B under --folder, which is freed at the end.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from utils.weight_diff.manifest import FILE as MANIFEST
from utils.weight_diff.output_folder import write_shards

REPOSITORY = Path(__file__).parents[1]
HIDDEN, INTERMEDIATE, VOCAB = 4096, 11008, 32000
SHARD = 500_000_000  # bytes; small, because the peak memory of a child includes that of its parent
COLUMNS = ("cp", "cp, synced", "recover", "published", "verify")


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of LLaMA-7B's tensors with `layers` layers."""
    square, wide, tall = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    layer = {f"self_attn.{name}_proj": square for name in "qkvo"}
    layer |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": tall}
    layer |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    found = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    found |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def write_model(folder: Path, layers: int, seed: int) -> int:
    """Writes a float16 model with normal weights, standard deviation 0.02; returns its bytes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    # The period differs between the models, so that all pairs of values, and their rounding, are different.
    values = (0.02 * torch.randn(8_000_000 + seed, generator=generator)).half()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        position = 0
        for name, shape in shapes(layers).items():
            numel = math.prod(shape)
            repeated = values.repeat(2 + numel // len(values))
            yield name, repeated[position : position + numel].clone().reshape(shape)
            position = (position + numel) % len(values)

    write_shards(folder, tensors(), SHARD)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCAB, "num_attention_heads": 32}
    config = {"model_type": "llama", "num_hidden_layers": layers, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in folder.iterdir())


def drop_from_cache(*folders: Path) -> None:
    """Writes the files to the disk and drops them from the page cache."""
    for file in (file for folder in folders for file in folder.iterdir()):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed(*command: str | Path) -> tuple[float, float]:
    """Runs a command; returns (seconds, peak resident memory in GiB). Prints its output if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPOSITORY, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{output}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def merge(command: str, tuned: Path, *flags: str | Path) -> tuple[float, float]:
    """Runs `timed` on merge_weight_en.py."""
    return timed(sys.executable, "merge_weight_en.py", command, "--path_tuned", tuned, *flags)


def copy(raw: Path, diff: Path, target: Path) -> tuple[float, float]:
    """Returns (seconds of cp, seconds until the copy is on the disk)."""
    drop_from_cache(raw, diff)
    start = time.perf_counter()
    timed("cp", "-r", "--reflink=never", raw, target)
    for file in diff.glob("*.safetensors"):
        timed("cp", file, "/dev/null")
    copied = time.perf_counter() - start
    timed("sync", *target.iterdir())
    return copied, time.perf_counter() - start


def measure(place: Path, layers: int, repeats: int) -> str:
    """Returns one line of the table."""
    raw, model, diff, bare = (place / name for name in ("raw", "model", "diff", "bare_diff"))
    size = write_model(raw, layers, 1)
    write_model(model, layers, 2)
    merge("make_diff", model, "--path_raw", raw, "--path_diff", diff, "--model_type", "policy")
    shutil.rmtree(model)
    bare.mkdir()
    for file in diff.iterdir():
        if file.name != MANIFEST:
            (bare / file.name).symlink_to(file)
    seconds: dict[str, list[float]] = {}
    memory = []
    for _ in range(repeats):
        for name, value in zip(("cp", "cp, synced"), copy(raw, diff, place / "copy")):
            seconds.setdefault(name, []).append(value)
        shutil.rmtree(place / "copy")
        for name, source in (("recover", diff), ("published", bare)):
            drop_from_cache(raw, diff)
            flags = ("--path_raw", raw, "--path_diff", source, "--model_type", "policy")
            taken, peak = merge("recover", place / "tuned", *flags)
            seconds.setdefault(name, []).append(taken)
            memory.append(peak)
            if name == "recover":
                drop_from_cache(place / "tuned")
                seconds.setdefault("verify", []).append(merge("verify", place / "tuned")[0])
            shutil.rmtree(place / "tuned")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    columns = [f"{layers}", f"{size / 1e9:.1f}", *(f"{medians[name]:.1f}" for name in COLUMNS)]
    columns += [f"{medians[name] / medians['cp']:.2f}" for name in ("recover", "published")]
    return " | ".join([*columns, f"{max(memory):.2f}"])


def main() -> None:
    """Measures each size and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[32], help="numbers of layers to measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=REPOSITORY / "outputs", help="folder on the disk to measure")
    options = parser.parse_args()
    Path(options.folder).mkdir(exist_ok=True)
    print(" | ".join(["layers", "GB", *(f"{name}, s" for name in COLUMNS), "recover / cp", "published / cp", "GiB"]))
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="merge_7b.") as place:
            print(measure(Path(place), layers, options.repeats), flush=True)


if __name__ == "__main__":
    main()
