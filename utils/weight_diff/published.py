"""Published weight diffs and their sums. Imports nothing heavy, for --help."""

import math
from dataclasses import dataclass

from utils.errors import Say, UserError

DTYPES = ("float16", "bfloat16", "float32")  # of weights
_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 0.0}  # relative step of 16-bit rounding
_TOLERANCE = 1e-5  # relative, of a sum


@dataclass(frozen=True)
class Release:
    """The weight diffs published in one language.

    base: name of the base model. totals: model type -> published sum of all tensors of the recovered model in float32,
    with its rotary buffers, or None. template: whose tags the tokenizer needs. default_type: of models, if any.
    """

    base: str
    totals: dict[str, float | None]
    template: str
    default_type: str | None = None


def rounding_slack(dtype: str, squares: float) -> float:
    """Returns four standard deviations of the change of a sum when its values are rounded to `dtype`; 0 for float32.

    The error of a rounded value has variance step^2 / 12; a step is at most eps times the value. squares: sum of the
    squared values.
    """
    return 4 * _EPS[dtype] * math.sqrt(squares / 12)


def check_published(
    total: float, release: Release, model_type: str | None, remedy: str, say: Say, slack: float = 0.0
) -> None:
    """Raises UserError if a sum differs from the one published for the model type. Prints the result."""
    if model_type is None:
        raise UserError("--path_tuned has no manifest; pass --model_type to check the sum published for it")
    if (expected := release.totals[model_type]) is None:
        say(f"no sum is published for --model_type {model_type}: not checked (the sum is {total:.4f})")
    else:
        check_total(total, expected, f"that published for --model_type {model_type}", remedy, slack)
        say(f"sum {total:.4f}: as published for --model_type {model_type}")


def check_total(total: float, expected: float, what: str, remedy: str, slack: float = 0.0) -> None:
    """Raises UserError when two sums differ by more than rounding. what: name of the expected one."""
    if not abs(total - expected) <= _TOLERANCE * abs(expected) + slack:
        raise UserError(f"the sum of all tensors is {total:.4f}, {what} is {expected:.4f}; {remedy}")


def rotary_total(config: dict) -> float:
    """Returns the sum of the buffers `rotary_emb.inv_freq` of all layers: 238.7185 for LLaMA-7B.

    Published sums include these buffers: θ^(-2i/d) for i < d/2, once per layer; θ is 10000 by default.
    """
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    return config["num_hidden_layers"] * sum(theta ** (-i / width) for i in range(0, width, 2))
