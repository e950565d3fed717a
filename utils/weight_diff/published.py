"""Published weight diffs, their sums, and how a command writes. Imports nothing heavy, as --help needs it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from utils.errors import UserError

DTYPES = ("float16", "bfloat16", "float32")  # of weights
_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 0.0}  # of rounding to 16 bits
_TOLERANCE = 1e-5  # relative, of a sum


@dataclass(frozen=True)
class Release:
    """The weight diffs published in one language.

    base: what they are differences to, in words. totals: model type -> published sum of all tensors of the recovered
    model, in float32 and with its rotary buffers; None where none was published. template: the one of data/template.py
    whose tags the tokenizer needs. default_type: the model type where the command line names none.
    """

    base: str
    totals: dict[str, float | None]
    template: str
    default_type: str | None = None


@dataclass(frozen=True)
class Output:
    """dtype: of the written tensors, None for the input's own. max_shard_bytes: of one file's tensors, a single larger
    tensor excepted. device, threads: where float32 values are added, and CPU threads for it."""

    dtype: str | None = None
    max_shard_bytes: int = 2_000_000_000
    device: str = "cpu"
    threads: int = 1


def rounding_slack(dtype: str, squares: float) -> float:
    """Four standard deviations of what rounding all values to `dtype` does to their sum; 0 in float32.

    A rounded value is off by up to half a step, evenly spread and each for itself: its variance is step^2 / 12, and a
    step is at most eps times the value. Published sums are of the values before rounding. squares: the squared values'.
    """
    return 4 * _EPS[dtype] * math.sqrt(squares / 12)


def check_published(
    total: float, release: Release, model_type: str | None, remedy: str, say: Callable[[str], None], slack: float = 0.0
) -> None:
    """Compares a sum with that published for the model type, if there is one. Raises UserError when it differs."""
    if model_type is None:
        raise UserError("--path_tuned has no manifest: give --model_type, to check the sum published for it")
    if release.totals[model_type] is None:
        say(f"no sum is published for --model_type {model_type}: not checked (the sum is {total:.4f})")
        return
    check_total(total, release.totals[model_type], f"that published for --model_type {model_type}", remedy, slack)
    say(f"sum {total:.4f}: as published for --model_type {model_type}")


def check_total(total: float, expected: float, what: str, remedy: str, slack: float = 0.0) -> None:
    """Raises UserError when two sums differ by more than rounding. what: the expected one, in words."""
    if not abs(total - expected) <= _TOLERANCE * abs(expected) + slack:
        raise UserError(f"the sum of all tensors is {total:.4f}, {what} is {expected:.4f}: {remedy}")


def rotary_total(config: dict) -> float:
    """Sum of the buffers `rotary_emb.inv_freq` of all layers: 238.7185 for LLaMA-7B.

    Published sums were taken when these were still saved: θ^(-2i/d) for i < d/2, once a layer; θ is 10000 unless told.
    """
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    return config["num_hidden_layers"] * sum(theta ** (-i / width) for i in range(0, width, 2))
