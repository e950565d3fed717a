"""Flags about records of data, which every command that reads data shares. No torch."""

import re
from dataclasses import dataclass, field
from typing import Literal

from utils.data_files import parse_sources
from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.text import TextFlags

FIELD = r"\{([^{}\s][^{}]*)\}"  # in --prompt_template
DATA_PATHS = ("data_path", "ppo_pretrain_data_path", "center_data_path")


@dataclass
class RecordFlags(TextFlags):
    """Data: which records are read, and how."""

    split: str = "train"
    """Split to read of a data set that has several: --data_path owner/name --split train_prefs"""
    valid_split: str = ""
    """Split of the held-out records. Default: validation or valid, if there is one"""
    columns: list[str] = field(default_factory=list)
    """Names of columns, ours=theirs: prompt=question answer=data.solution, where the dot leads into an object"""
    prompt_template: str = ""
    """Text of the prompt with {column} where a column's value goes: "Solve: {question}\\nChoices: {choices}" """
    preferred_by: Literal["better", "safer"] = "better"
    """Label that chooses the better answer where records have two (PKU-SafeRLHF)"""
    reasoning: Literal["keep", "drop"] = "keep"
    """Reasoning of the assistant that records have in a field of its own. keep: it is put into <think> … </think>
    before the answer; drop: it is left out"""
    data_cache: str = ""
    """Folder for encoded data of 16 MB and more, made once per node. Default: ~/.cache/ppo-max/data"""
    data_workers: int = 0
    """Processes that encode data of 16 MB and more; 0: one per core, at most 32"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, data_workers=(0, None))
        for pair in self.columns:
            ours, equals, theirs = pair.partition("=")
            if not ours or not equals or not theirs:
                raise UserError(f"--columns {pair}: write our name, =, and the name in the records: prompt=question")
        names = [pair.partition("=")[0] for pair in self.columns]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"--columns names {twice} twice; pass it once")
        if self.prompt_template:
            text = self.prompt_template.replace("{{", "").replace("}}", "")
            rest, fields = re.subn(FIELD, "", text)
            if not fields or "{" in rest or "}" in rest:
                raise UserError(
                    f"--prompt_template {self.prompt_template}: put the names of columns into braces, as in "
                    '"Solve: {question}"; {{ and }} stand for braces'
                )
        for name in DATA_PATHS:
            value = getattr(self, name, None) or []
            if isinstance(value, str):  # from Python
                setattr(self, name, value := [value])
            parse_sources(value, f"--{name}")
            if not all(value):
                raise UserError(f"--{name} contains an empty name: pass folders, files or hub ids")
