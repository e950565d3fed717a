"""What is known of published weight diffs, and how a command is to write. Light: `--help` needs it."""

from dataclasses import dataclass


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
    max_shard_bytes: int = 5_000_000_000
    device: str = "cpu"
    threads: int = 1
