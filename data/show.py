"""Show data as the models will see it: python -m data.show --data_path DATA [--tokenizer_name_or_path MODEL].

Prints records with their tokens, counts, what is dropped and why, lengths, duplicates, and overlap with held-out data.
Without a tokenizer it prints texts, and lengths are in characters. Records are streamed; no model is loaded.
"""

import os
import shutil
import sys
from dataclasses import dataclass, field
from typing import Literal

from utils.errors import UserError
from utils.files import atomic_file, check_output_file
from utils.flags.checks import check_range
from utils.flags.data import RecordFlags
from utils.flags.fields import Common
from utils.flags.parser import entry_point, parse_args


@dataclass
class ShowFlags:
    """Show: which records, and as what."""

    data_path: Common[list[str]] = field(default_factory=list)
    """Data: folders of *train* and *valid* files, files or hub ids (owner/name:config@split). A number after each
    sets its share: a 0.7 b 0.3"""
    tokenizer_name_or_path: Common[str | None] = None
    """Tokenizer: a folder, a tokenizer.model or a hub id. Default: none; texts are shown, and lengths in characters"""
    kind: Common[Literal["auto", "prompts", "dialogues", "preferences"]] = "auto"
    """What the records are used as. auto: what the first of them can be"""
    num_records: Common[int] = 3
    """Records of each source that are shown"""
    max_records: Common[int] = 0
    """Records of each source and split that are read; 0: all"""
    context_truncate: Common[int] = 2048
    """Longest prompt, dialogue or pair in tokens, as in training; longer ones lose their oldest turns"""
    batch_size: Common[int] = 32
    """Records per optimizer step, for the number of steps in an epoch"""
    output: Common[str | None] = None
    """HTML page to write. Default: the report is printed"""


@dataclass
class ShowConfig(ShowFlags, RecordFlags):
    """Show data as the models will see it."""

    required = ("data_path",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self, num_records=(0, None), max_records=(0, None), context_truncate=(1, None), batch_size=(1, None)
        )
        if self.template != "auto" and not self.tokenizer_name_or_path:
            raise UserError(f"--template {self.template} needs a tokenizer; pass --tokenizer_name_or_path")


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Prints the report, or writes it to --output. A UserError follows the report if no record can be used."""
    config = parse_args(ShowConfig, argv)
    from data.showing.pages import to_html, to_text  # imports torch, which takes seconds
    from data.showing.report import report

    if config.output:
        check_output_file(config.output, "--output")
    sections, problem = report(config)
    if config.output:
        with atomic_file(config.output, "--output") as file:
            file.write(to_html(f"Data: {' '.join(config.data_path)}", sections))
        print(f"written: {config.output} (open it in a browser)")
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        text = to_text(sections, shutil.get_terminal_size((100, 24)).columns, colour)
        print(text, end="", file=sys.stdout.raw if colour else sys.stdout)  # a SafeStream would remove the colours
    if problem:
        raise UserError(problem)


if __name__ == "__main__":
    main()
