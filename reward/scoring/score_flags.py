"""Flags of `python -m reward.score`."""

import os
from dataclasses import dataclass, field
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.engine import ForwardConfig


@dataclass
class ScoreConfig(ForwardConfig):
    """Score texts or dialogues with reward models, or compare two files of answers."""

    model: list[str] = field(default_factory=list)
    """Reward model, folder or hub id; of several the score is the mean, their deviation stands beside it"""
    input: str | None = None
    """What to score: .jsonl (a record a line), .txt (a text a line), .json, .parquet, .csv, or - for a pipe"""
    compare: list[str] = field(default_factory=list)
    """Instead: two files of answers to the same prompts, in the same order; how often the first wins"""
    output: str | None = None
    """File for the scored records, or for the comparison as JSON; appears when all is done. Default: standard output"""
    column: str = "score"
    """Name of the score in the records; COLUMN_std and COLUMNs are the deviation and all scores of several models"""
    tie_margin: float = 0.0
    """Scores that differ by no more than this are a tie"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer; default: the one in each model's folder"""
    format: Literal["auto", "json", "text"] = "auto"
    """Lines of --input: json values or texts; auto goes by the file's ending, in a pipe by the first line"""
    micro_batch_tokens: int = 8192
    """Tokens of a forward pass, padding included"""
    chunk_size: int = 1024
    """Records read, sorted by length and scored together"""
    offload_frozen: bool = False
    """Keep the models in host memory, one on the device at a time"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.input) == bool(self.compare):
            raise UserError(
                "give --input FILE (or - for a pipe) to score it, or --compare A B for two files of answers"
            )
        if self.compare and len(self.compare) != 2:
            raise UserError(f"--compare takes two files of answers, not {len(self.compare)}")
        if not self.model and not self.compare:
            raise UserError("--model is missing: give one or several reward models")
        twice = next((path for path in self.model if self.model.count(path) > 1), None)
        if twice:
            raise UserError(f"--model names {twice} twice: give each reward model once")
        check_range(self, micro_batch_tokens=(1, None), chunk_size=(1, None), tie_margin=(0, None))
        if not self.output:
            return
        for path in (self.input, *self.compare):
            if path and os.path.realpath(path) == os.path.realpath(self.output):
                raise UserError(f"--output {self.output} is read here: give another file")
