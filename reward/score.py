"""What reward models say of texts and dialogues, as a filter; and of two sets of answers to the same prompts.

python -m reward.score --model M --input dialogues.jsonl > scored.jsonl          # or --input - in a pipe
python -m reward.score --model M --compare ours.jsonl theirs.jsonl               # win, tie, lose (Part I, Figure 10)

Results come in the order of the input, `--chunk_size` records at a time; memory does not grow with the input.
"""

import contextlib
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Literal

from utils.errors import UserError
from utils.flags.parser import ForwardConfig, check_range, entry_point, parse_args


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


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Results to standard output or --output, everything else to standard error."""
    config = parse_args(ScoreConfig, argv)
    results = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            run(config, results)
    except BrokenPipeError:  # the reader has seen enough (`| head`); nothing is left to flush to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), results.fileno())


def run(config: ScoreConfig, results: IO[str]) -> None:
    """Scores or compares, on every rank; the first one writes."""
    from data.formats.json_lines import json_line
    from data.formats.stream import stream_records
    from reward.scoring.score_records import compare, load_judges, scored_chunks
    from utils.distributed import is_main, world_size
    from utils.engine.engine import init_distributed, shutdown_distributed
    from utils.run.folder import atomic_file, check_output_file, write_result

    if config.output:
        check_output_file(config.output, "--output")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # under a launcher; one process needs no group, which costs seconds
        init_distributed()
    if config.input == "-" and world_size() > 1:
        raise UserError("--input - is one pipe, and there are several processes: give a file")
    flag, paths = ("--compare", config.compare) if config.compare else ("--input", [config.input])
    streams = [stream_records(path, flag, config.format) for path in paths]
    say = partial(print, file=sys.stderr, flush=True) if is_main() else lambda text: None
    judges = load_judges(config, say)
    if config.compare:
        table, text = compare(config, judges, streams, say)
        if is_main():
            print(text, file=results, flush=True)
        if is_main() and config.output:
            write_result(config.output, "--output", table)
    else:
        to_file = atomic_file(config.output, "--output") if config.output and is_main() else None
        with to_file or contextlib.nullcontext(results) as file:
            for rows in scored_chunks(config, judges, *streams, say):
                if is_main():
                    file.writelines(map(json_line, rows))
                    file.flush()
    shutdown_distributed()


if __name__ == "__main__":
    main()
