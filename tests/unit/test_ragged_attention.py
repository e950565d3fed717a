"""Triton's kernels for one new token per slot against plain loops in float64: in its interpreter where no GPU is."""

import json
import os
import subprocess
import sys

import pytest
import torch

# The interpreter of Triton 3.6 does not run with NumPy 2.4.
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.7")

from ppo.decoding.ragged_attention import append_rotated, attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS, END = 140, 130
FIRST = [0, END, 71, END - 16, END + 9]  # the last is a slot that is not in use
ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of numbers around 1
needs_gpu = pytest.mark.gpu


def cache_of(heads: int, size: int, dtype: torch.dtype, fill: float) -> torch.Tensor:
    """Random where a slot holds something; `fill` elsewhere: what is read there shows."""
    cache = torch.randn(len(FIRST), heads, COLUMNS, size, generator=torch.Generator().manual_seed(heads + size))
    for slot, first in enumerate(FIRST):
        cache[slot, :, : min(first, END)] = cache[slot, :, END + 1 :] = fill
    return cache.to(DEVICE, dtype)


def plain_attention(query, keys, values, scaling: float) -> torch.Tensor:
    output, group = query.double(), query.shape[1] // keys.shape[1]
    for slot, first in enumerate(FIRST):
        own = slice(min(first, END), END + 1)
        for head in range(query.shape[1]):
            key, value = (x[slot, head // group, own].double() for x in (keys, values))
            output[slot, head] = torch.softmax(key @ output[slot, head] * scaling, 0) @ value
    return output


def on_device(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("heads", "shared", "size", "dtype", "splits"),
    [
        (2, 2, 16, torch.float32, 1),
        (6, 2, 16, torch.float32, 3),
        (2, 2, 64, torch.bfloat16, None),
        (1, 1, 128, torch.bfloat16, 1),
        (2, 1, 256, torch.float32, 3),
        (8, 1, 128, torch.float16, 3),  # stands for bf16, which Triton's interpreter multiplies as integers
        (20, 1, 64, torch.float16, None),
        *(pytest.param(6, 2, 64, torch.bfloat16, splits, marks=needs_gpu) for splits in (1, 3, None)),
        *(pytest.param(32, 8, 128, torch.bfloat16, splits, marks=needs_gpu) for splits in (1, None)),
        *(pytest.param(4, 1, 256, torch.bfloat16, splits, marks=needs_gpu) for splits in (1, None)),
    ],
)
def test_attention_reads_what_each_slot_holds(heads, shared, size, dtype, splits):
    keys, values = (cache_of(shared, size, dtype, float("nan")) * scale for scale in (2.0, 1.0))
    query = torch.randn(len(FIRST), heads, size, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    found = attend(query, keys, values, on_device(*FIRST), on_device(END)[0], 0.3, splits)
    assert found.dtype == dtype
    expected = plain_attention(query, keys, values, 0.3)
    torch.testing.assert_close(found.double(), expected, atol=ERROR[dtype], rtol=ERROR[dtype])


@needs_gpu  # in the interpreter one program runs after the other
def test_the_same_bits_again():
    query, (keys, values) = torch.randn(5, 8, 64, device=DEVICE), [cache_of(8, 64, torch.float32, 0.0)] * 2
    first = attend(query, keys, values, on_device(*FIRST), on_device(END)[0], 0.3)
    for _ in range(20):
        assert torch.equal(attend(query, keys, values, on_device(*FIRST), on_device(END)[0], 0.3), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "shared", "size"), [(4, 4, 16), (6, 2, 128)])
def test_new_keys_and_values_join_the_cache(heads, shared, size, dtype):
    slots = len(FIRST) - 1  # the cache has one more, which stays as it is
    keys, values = (cache_of(shared, size, dtype, fill) for fill in (0.0, 1.0))
    query, key, value = (torch.randn(slots, n, size).to(DEVICE, dtype) for n in (heads, shared, shared))
    angles = (torch.rand(slots, 1, size // 2) * 7).repeat(1, 1, 2)
    cos, sin = (f(angles).to(DEVICE, dtype) for f in (torch.cos, torch.sin))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        turned, half = x.double(), size // 2
        for i in range(half):
            a, b = x[..., i].double(), x[..., i + half].double()
            c, s = cos[..., i].double(), sin[..., i].double()
            turned[..., i], turned[..., i + half] = a * c - b * s, b * c + a * s
        return turned.to(dtype)

    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[:slots, :, END], expected_values[:slots, :, END] = rotated(key), value
    found = append_rotated(query, key, value, cos, sin, keys, values, on_device(END)[0])
    exact = {"atol": 1e-6, "rtol": 1e-6 if dtype == torch.float32 else 2**-7}  # an ulp: float64 may round otherwise
    torch.testing.assert_close(found, rotated(query), **exact)
    torch.testing.assert_close(keys, expected_keys, **exact)
    assert torch.equal(values, expected_values)


def test_kernels_compile_for_gpus(tmp_path):
    """Without one: Triton brings its compiler. The interpreter takes what no GPU would."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.compiled_kernels"]
    lines = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    found = [json.loads(line) for line in lines.splitlines()]
    assert len(found) == 2 * 4
    for kernel in found:
        assert kernel["shared"] <= 80_000  # two programs per multiprocessor of an A100
        assert (kernel["mma.sync"] > 0) == (kernel["kernel"] == "_attend_group")
        assert (kernel["cp.async.c"] > 0) == kernel["kernel"].startswith("_attend")
