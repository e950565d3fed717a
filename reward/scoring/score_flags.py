"""Flags of `python -m reward.score`."""

import os
from dataclasses import dataclass, field
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.engine import ForwardConfig
from utils.flags.fields import Common


@dataclass
class ScoreConfig(ForwardConfig):
    """Score texts or dialogues with reward models, or compare two files of answers."""

    model: Common[list[str]] = field(default_factory=list)
    """Reward model, or several: folders or hub ids. The score of several is their mean"""
    input: Common[str | None] = None
    """File to score: .jsonl (a record per line), .txt (a text per line), .json, .parquet or .csv; - reads a pipe"""
    compare: Common[list[str]] = field(default_factory=list)
    """Two files of answers to the same prompts, in place of --input; reports how often the first one wins"""
    output: Common[str | None] = None
    """File for the scored records or, as JSON, the comparison; written when all is done. Default: standard output"""
    column: str = "score"
    """Name of the score in the records. Several models add COLUMN_std, the deviation, and COLUMNs, all scores"""
    tie_margin: float = 0.0
    """Largest difference of two scores that counts as a tie"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of all models. Default: the one in each model's folder"""
    format: Literal["auto", "json", "text"] = "auto"
    """Format of the lines of --input. auto: by the file's ending, in a pipe by the first line"""
    micro_batch_tokens: Common[int] = 8192
    """Tokens per forward pass on each GPU, padding included. Changes speed and memory only"""
    chunk_size: int = 1024
    """Records that are read, sorted by length and scored together"""
    offload_frozen: bool = False
    """Keep the models in host memory, one at a time on the device"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.input) == bool(self.compare):
            raise UserError("pass --input FILE (or - for a pipe) to score it, or --compare A B for two such files")
        if self.compare and len(self.compare) != 2:
            raise UserError(f"--compare takes two files of answers, not {len(self.compare)}")
        if not self.model and not self.compare:
            raise UserError("--model is missing: pass one or several reward models")
        twice = next((path for path in self.model if self.model.count(path) > 1), None)
        if twice:
            raise UserError(f"--model contains {twice} twice: pass each reward model once")
        check_range(self, micro_batch_tokens=(1, None), chunk_size=(1, None), tie_margin=(0, None))
        if not self.output:
            return
        for path in (self.input, *self.compare):
            if path and os.path.realpath(path) == os.path.realpath(self.output):
                raise UserError(f"--output {self.output} is read by this command: choose another file")
