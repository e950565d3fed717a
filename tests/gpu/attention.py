"""Attention of one new token per slot: the masked call over all columns, and the kernel that reads each slot's own."""

import traceback

import torch
import triton

from benchmarks.timing import busy_seconds, copy_rate, measure
from ppo.decoding.attention import by_groups
from ppo.decoding.ragged_attention import attend
from utils.engine.engine import device

HEADS = {"mha": (32, 32), "gqa": (32, 8)}  # query heads, key-value heads
LENGTHS = ("equal", "ragged")
TOLERANCE = 0.01  # of the output's norm; rounding a right output to bf16 makes 0.0017
AIM = 0.6  # of the measured copy rate: the aim of a whole step of decoding


def check(toy: bool, report) -> None:
    """Figures SHAPE_SLOTS_LENGTHS: microseconds of both (alone, and back to back), bytes per second, errors."""
    rate = copy_rate(device(), 1 << 22 if toy else None)
    report(copy_tb_per_s=rate / 1e12, aim_share_of_copy_rate=AIM)
    columns, size, many = (48, 16, (2,)) if toy else (2048, 128, (16, 64))
    for name, (heads, shared) in HEADS.items():
        for slots in many:
            for kind in LENGTHS:
                shape = (slots, heads // 4, shared // 4) if toy else (slots, heads, shared)
                figures = compare(*shape, columns, size, kind, rate, toy)
                report(**{f"{name}_{slots}_{kind}": figures})
                for way in ("masked", "ragged"):
                    if failure := figures.get(f"{way}_failure"):
                        report.expect(False, f"{way} attention, {name}, {slots} slots, {kind}: {failure}")
                    if error := figures.get(f"{way}_error"):
                        report(**{f"{name}_{slots}_{kind}_{way}_share": figures[f"{way}_share_of_copy_rate"]})
                        text = (
                            f"{way} attention, {name}, {slots} slots, {kind}: error {error:.2g}, expected {TOLERANCE}"
                        )
                        report.expect(error <= TOLERANCE, text)


def compare(slots, heads, shared, columns, size, kind: str, rate: float, toy: bool) -> dict[str, float]:
    """The figures of one setting. rate: bytes per second of a copy."""
    generator = torch.Generator(device()).manual_seed(0)
    dtype = torch.float16 if toy else torch.bfloat16  # Triton's interpreter multiplies bf16 as integers
    options = {"device": device(), "dtype": dtype, "generator": generator}
    query = torch.randn(slots, heads, size, **options)
    keys, values = (torch.randn(slots, shared, columns, size, **options) for _ in range(2))
    least = columns if kind == "equal" else columns // 8
    lengths = torch.linspace(least, columns, slots, device=device()).int()
    first, end = columns - lengths, torch.tensor(columns - 1, dtype=torch.int32, device=device())
    hidden = torch.arange(columns, device=device()) < first[:, None]
    mask = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None, None]
    scaling = size**-0.5
    ways = {"masked": lambda: by_groups(query, keys, values, mask, scaling)[:, 0]}
    if kernel_runs():
        ways["ragged"] = lambda: attend(query, keys, values, first, end, scaling)
    truth = exact(query, keys, values, first.tolist(), scaling)
    live = 2 * int(lengths.sum()) * shared * size * keys.element_size()
    calls, figures = 1 if toy else 20, {"live_mb": live / 1e6}
    for name, way in ways.items():
        try:
            found = way().double()
        except Exception as error:  # noqa: BLE001  the figures of the other way count all the same
            traceback.print_exc()
            figures[f"{name}_failure"] = f"{type(error).__name__}: {error}"[:300]
            continue
        figures[f"{name}_error"] = float((found - truth).norm() / truth.norm())
        back_to_back = measure(way, calls, warm_up=calls // 10).device
        seconds = busy_seconds(way, calls) or back_to_back  # where the profiler may not see the device
        figures[f"{name}_us"] = 1e6 * seconds
        figures[f"{name}_back_to_back_us"] = 1e6 * back_to_back
        figures[f"{name}_gb_per_s"] = live / seconds / 1e9
        figures[f"{name}_share_of_copy_rate"] = live / seconds / rate
    return figures


def kernel_runs() -> bool:
    """Whether Triton's kernels run here: the interpreter of Triton 3.6 does not with NumPy 2.4."""
    return device().type == "cuda" or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


def exact(query, keys, values, first: list[int], scaling: float) -> torch.Tensor:
    """In float64, one slot after the other: [slots, heads, size]."""
    outputs = []
    for own, key, value, start in zip(query.double(), keys, values, first, strict=True):
        groups = own.unflatten(0, (len(key), -1))
        weights = (groups @ key[:, start:].double().transpose(1, 2) * scaling).softmax(-1)
        outputs.append((weights @ value[:, start:].double()).flatten(0, 1))
    return torch.stack(outputs)
