"""Flags: one dataclass becomes a command line. A docstring under each field is its `--help` text.

Light on purpose (no torch, no deepspeed): a wrong flag is reported in under a second.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import math
import os
import shlex
import sys
import textwrap
from dataclasses import dataclass
from typing import Literal, TypeVar

from utils.errors import UserError
from utils.flag_types import add_field, default_of
from utils.text_flags import TextFlags

Config = TypeVar("Config")
SEEDS = (0, 10**9)  # with ranks and streams added, every generator takes these


@dataclass
class ForwardConfig(TextFlags):
    """Flags of whatever runs a model."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of weights and activations; scores, log-probabilities, losses and optimizer state are float32 either way"""
    attn_implementation: str | None = None
    """Attention kernel by its transformers name (sdpa, flash_attention_2, eager); default: transformers' own choice"""


@dataclass
class EngineConfig(ForwardConfig):
    """Flags that every training stage shares: how weights are held, split and stepped."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 1 splits optimizer state, and the frozen models of PPO, over ranks; 2 also gradients; 3 also the
    weights of trained models"""
    offload_optimizer: bool = False
    """Keep optimizer state and float32 weights in host memory (slower, saves 12 bytes a parameter on the device)"""
    grad_accum_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype that the gradients of a step's micro-batches add up in under --dtype bf16 (fp32 models add up in float32
    either way). fp32 takes 2 more bytes a parameter, split over ranks, and --zero_stage 2 or 3"""
    gradient_clip: float = 1.0
    """Global gradient norm that each engine is clipped to; 0 switches clipping off"""
    explosion_limit: float = 1e9
    """A loss, score or global gradient norm beyond this is as bad as one that is not finite: no step is made"""
    adam_beta1: float = 0.9
    """AdamW: decay of the first moment"""
    adam_beta2: float = 0.95
    """AdamW: decay of the second moment"""
    adam_eps: float = 1e-8
    """AdamW: added to the root of the second moment"""
    gradient_checkpoint: Literal["auto"] | bool = False
    """Recompute activations in the backward pass: about a third more time for a fraction of the memory. auto: on a GPU
    recompute as few layers as the memory that is free once the models are loaded allows; on a CPU none"""
    compile: bool = False
    """Compile the decoder layers (torch.compile) for forward and backward passes: about a minute at the start. Not
    compiled are decoding, and frozen models that are split over ranks. On a CPU steps got no faster"""
    deterministic: bool = False
    """Use deterministic kernels, so that runs on GPUs repeat bit by bit; the backward pass of attention becomes slower.
    An operation that has no such kernel is named; in a backward pass it stops the run"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self,
            gradient_clip=(0, None),
            explosion_limit=(1, None),
            adam_beta1=(0, 0.999999),
            adam_beta2=(0, 0.999999),
            adam_eps=(0, None),
        )
        if self.dtype == "bf16" and self.zero_stage == 0:
            raise UserError(
                "--zero_stage 0 holds one float32 copy of the weights: give --dtype fp32 with it, or --zero_stage 1"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise UserError("--offload_optimizer needs --zero_stage 1, 2 or 3")
        if self.adds_up_in_float32 and self.zero_stage < 2:
            raise UserError(
                f"--grad_accum_dtype fp32 with --zero_stage {self.zero_stage}: DeepSpeed then uses another optimizer, "
                "whose state is not known here; give --zero_stage 2 or 3"
            )
        if self.compile and self.zero_stage == 3:
            raise UserError("--compile does not go with --zero_stage 3, whose weights come and go inside a layer")

    @property
    def adds_up_in_float32(self) -> bool:
        """Whether gradients of bf16 weights are kept in float32 between micro-batches."""
        return self.dtype == "bf16" and self.grad_accum_dtype == "fp32"


def check_range(config, **limits: tuple[float | None, float | None]) -> None:
    """Raises UserError for the first named field outside its closed [low, high] range, or not finite."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise UserError(f"--{name} {value:g}: give a number {bounds}")


def check_warmup(config) -> None:
    """Raises UserError for a warm-up that is longer than the run: it would never reach its learning rate."""
    if config.warmup_steps > config.train_steps:
        raise UserError(f"--warmup_steps {config.warmup_steps}: give at most --train_steps {config.train_steps}")


def field_help(config_type: type) -> dict[str, str]:
    """Field name -> the docstring under it, over the class and its bases; read from the source."""
    texts: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are UserErrors."""

    def error(self, message: str):
        """What argparse calls instead of returning."""
        raise UserError(f"{message}{_suggestion(message, self)} (see --help)")


def build_parser(config_type: type) -> argparse.ArgumentParser:
    """A parser for the dataclass: no abbreviations, help from field docstrings, mistakes as UserError."""
    formatter, description = argparse.ArgumentDefaultsHelpFormatter, (config_type.__doc__ or "").split("\n")[0]
    parser = FlagParser(allow_abbrev=False, description=description, formatter_class=formatter)
    help_texts = field_help(config_type)
    for field in dataclasses.fields(config_type):
        add_field(parser, field, help_texts.get(field.name, ""))
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers append it
    return parser


def _suggestion(message: str, parser: argparse.ArgumentParser) -> str:
    if not message.startswith("unrecognized"):
        return ""
    unknown = next((word.split("=")[0] for word in message.split() if word.startswith("--")), "")
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(unknown, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def given_flags(parser: argparse.ArgumentParser, argv: list[str]) -> dict:
    """The flags that stand on the command line, without any default."""
    defaults = {action: action.default for action in parser._actions}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv, argparse.Namespace()))
    for action, default in defaults.items():
        action.default = default
    return given


def parse_args(
    config_type: type[Config],
    argv: list[str] | None = None,
    presets: dict[str, dict] | None = None,
    amounts: dict[str, str] | None = None,
) -> Config:
    """Command line -> config. Explicit flags win over `--preset`, which wins over field defaults.

    presets: name -> {field: value}. amounts: switch -> its amount, {"use_x": "x"}: an explicit amount of 0 switches
    off a `use_x` that only the preset had set; an explicit `--use_x` with amount 0 is left for the config to refuse.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(config_type)
    parser._defaults = {}
    if any(word in ("-h", "--help") for word in argv):
        parser.parse_args(argv)
    optional = {action.dest: action.required for action in parser._actions}
    for action in parser._actions:
        action.required = False
    given = given_flags(parser, argv)
    for action in parser._actions:
        action.required = optional[action.dest]
    if presets:
        preset = given.get("preset", next(f.default for f in dataclasses.fields(config_type) if f.name == "preset"))
        values = dict(presets[preset])
        for switch, amount in (amounts or {}).items():
            if given.get(amount) == 0 and switch not in given:
                values[switch] = False
        parser.set_defaults(**values)
    arguments = vars(parser.parse_args(argv))
    arguments.pop("local_rank")
    return config_type(**arguments)


def changed_flags(config) -> str:
    """The flags whose values are not those of the defaults or the preset, as they may be pasted behind the command."""
    words = []
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if value == config.preset_values.get(name, default_of(field)):
            continue
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return shlex.join(words)


def entry_point(main):
    """For `main(argv=None)`: a UserError becomes one line and exit code 2, Ctrl-C one line and 130; bugs show."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        os.umask(os.umask(0o777) | 0o002)  # nothing that is written may be changed by everyone
        if isinstance(sys.stdout, io.TextIOWrapper):  # what is said is read at once behind a pipe too, and after a kill
            sys.stdout.reconfigure(line_buffering=True, errors="replace")  # "?" for what a terminal cannot show
        where = f" [rank {os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        try:
            return main(argv)
        except UserError as error:
            text = " ".join(str(error).splitlines())  # a path may hold anything
            print(f"error{where}: {text}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"stopped by Ctrl-C{where}", file=sys.stderr, flush=True)
            sys.exit(130)

    return run
