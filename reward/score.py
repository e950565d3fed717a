"""Score texts and dialogues with reward models, or compare two sets of answers to the same prompts.

python -m reward.score --model M --input dialogues.jsonl > scored.jsonl          # or --input - in a pipe
python -m reward.score --model M --compare ours.jsonl theirs.jsonl               # win, tie, lose (Part I, Figure 10)

Results have the order of the input. `--chunk_size` records are read at a time, so that memory does not grow.
"""

import contextlib
import os
import sys
from functools import partial
from typing import IO

from reward.scoring.score_flags import ScoreConfig
from utils.errors import UserError
from utils.flags.parser import entry_point, parse_args


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Writes results to standard output or --output, and everything else to standard error."""
    config = parse_args(ScoreConfig, argv)
    results = sys.stdout.raw  # each line is escaped as it is made; a closed pipe ends the command
    try:
        with contextlib.redirect_stdout(sys.stderr):
            run(config, results)
    except BrokenPipeError:  # the reader has closed the pipe (`| head`); do not flush to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), results.fileno())


def run(config: ScoreConfig, results: IO[str]) -> None:
    """Scores or compares on all ranks; the first rank writes."""
    from data.formats.json_lines import json_line
    from data.formats.stream import stream_records
    from reward.scoring.score_records import compare, load_reward_models, scored_chunks
    from utils.distributed import is_main, world_size
    from utils.engine.engine import init_distributed, shutdown_distributed
    from utils.files import atomic_file, check_output_file, write_json
    from utils.terminal import printable

    if config.output:
        check_output_file(config.output, "--output")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # a process group takes seconds; one process needs none
        init_distributed()
    if config.input == "-" and world_size() > 1:
        raise UserError("--input -: several processes cannot share a pipe; use a file")
    flag, paths = ("--compare", config.compare) if config.compare else ("--input", [config.input])
    streams = [stream_records(path, flag, config.format) for path in paths]
    say = partial(print, file=sys.stderr, flush=True) if is_main() else lambda text: None
    models = load_reward_models(config, say)
    if config.compare:
        table, text = compare(config, models, streams, say)
        if is_main():
            print(printable(text), file=results, flush=True)
        if is_main() and config.output:
            write_json(config.output, table, "--output")
    else:
        to_file = atomic_file(config.output, "--output") if config.output and is_main() else None
        with to_file or contextlib.nullcontext(results) as file:
            for rows in scored_chunks(config, models, *streams, say):
                if is_main():
                    file.writelines(map(json_line, rows))
                    file.flush()
    shutdown_distributed()


if __name__ == "__main__":
    main()
