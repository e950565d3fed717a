"""Measure preference strength:   python -m reward.strength --model A B C … --data_path PREFERENCES --output FOLDER

Several reward models, trained on the same preferences with different seeds, score both answers of each pair (Part II
§2). Adds to each record the mean and standard deviation of the score difference and all scores, in the columns that
`reward.train --flip_negative` and `--use_margin` read. The output has the files of the input (as .jsonl) and can be the
next --data_path. Also writes a plot and prints a histogram.
"""

import os
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from data.formats.json_lines import json_line
from data.formats.ranked_answers import is_ranked
from data.formats.records import BadRecord, Record, Tally, read_records
from data.formats.score_columns import CHOSEN_SCORES, DEVIATION, REJECTED_SCORES, STRENGTH
from data.preferences import Preference, parse_preference
from reward.evaluation.plots import check_plots, draw_strengths
from reward.evaluation.score_preferences import PanelConfig, score_preferences
from reward.metrics import ScoredItems
from utils.errors import UserError
from utils.files import atomic_folder, check_writable
from utils.flags.parser import entry_point, parse_args

ROWS, WIDTH = 12, 40  # size of the text histogram


@dataclass
class StrengthConfig(PanelConfig):
    """Annotate preferences with the mean and deviation of score differences over an ensemble of reward models."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.model) < 2:
            raise UserError("--model: strength needs at least two reward models, trained from different seeds")
        if not self.output:
            raise UserError("--output is missing: give a folder for the annotated files")
        if os.path.lexists(self.output) and (not os.path.isdir(self.output) or os.listdir(self.output)):
            raise UserError(f"--output {self.output} is there already: choose another folder")
        check_writable(self.output, "--output")


def pairs_of(records: list[Record]) -> dict[int, Preference]:
    """Returns record index -> preference; reports the records that cannot be scored and stay unchanged."""
    pairs, tally = {}, Tally("preferences")
    for place, record in enumerate(records):
        try:
            preference = parse_preference(record, tally)
        except BadRecord as error:
            tally.add(f"not changed: {error}", record.source)
            continue
        if is_ranked(record.value):
            tally.add("not changed: ranked answers have no strength columns", record.source)
        else:
            pairs[place] = preference
    tally.report(print)
    if not pairs:
        raise UserError(f"--data_path: no pair to score ({'; '.join(tally.lines())}); fix the records")
    return pairs


def strength_columns(models: list[ScoredItems]) -> dict[int, dict]:
    """Returns index of a pair -> its new columns. The deviation is the population's, as in Part II."""
    columns = {}
    for k, item in enumerate(models[0].items):
        chosen, rejected = ([float(scored.scores[2 * k + side]) for scored in models] for side in (0, 1))
        differences = [a - b for a, b in zip(chosen, rejected, strict=True)]
        columns[item.place] = {
            STRENGTH: statistics.fmean(differences),
            DEVIATION: statistics.pstdev(differences),
            CHOSEN_SCORES: chosen,
            REJECTED_SCORES: rejected,
        }
    return columns


def annotated(value: dict, columns: dict) -> dict:
    """Returns the record with its new columns, without old ones (spelled with spaces or underscores)."""
    return {key: x for key, x in value.items() if key.replace("_", " ") not in columns} | columns


def file_name(record: Record, split: str) -> str:
    """Returns the output file of a record: its input file's name as .jsonl, or for hub data sets the split's name."""
    source = Path(record.source.rpartition(":")[0])
    return f"{source.stem if source.exists() else split}.jsonl"


def summary(means: list[float], deviations: list[float]) -> str:
    """Returns statistics and a text histogram of the mean strengths."""
    negative = sum(mean < 0 for mean in means)
    lines = [
        f"mean preference difference of {len(means)} pairs: mean {statistics.fmean(means):.3f}, "
        f"std {statistics.pstdev(means):.3f}; below 0: {negative} ({negative / len(means):.1%})",
        f"std over the models: mean {statistics.fmean(deviations):.3f}",
    ]
    low, high = min(means), max(means)
    width = (high - low) / ROWS or 1.0
    counts = [0] * ROWS
    for mean in means:
        counts[min(int((mean - low) / width), ROWS - 1)] += 1
    for k, count in enumerate(counts):
        bar = "#" * round(WIDTH * count / max(counts))
        lines.append(f"{low + k * width:9.3f} to {low + (k + 1) * width:8.3f}  {count:7} {bar}")
    return "\n".join(lines)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m reward.strength`; runs in one process."""
    config = parse_args(StrengthConfig, argv)
    check_plots()
    splits = dict(zip(("train", "valid"), read_records(config.data_path), strict=True))
    records = [(split, record) for split, part in splits.items() for record in part or []]
    pairs = pairs_of([record for _, record in records])
    columns = strength_columns(score_preferences(list(pairs.values()), config, print))
    new = {place: columns[k] for k, place in enumerate(pairs) if k in columns}
    lines = defaultdict(list)
    for place, (split, record) in enumerate(records):
        value = annotated(record.value, new[place]) if place in new else record.value
        lines[file_name(record, split)].append(json_line(value))
    means, deviations = ([row[name] for row in columns.values()] for name in (STRENGTH, DEVIATION))
    with atomic_folder(config.output) as folder:
        for name, texts in lines.items():
            Path(folder, name).write_text("".join(texts), encoding="utf-8")
        draw_strengths(means, deviations, os.path.join(folder, "strength.png"))
    print(summary(means, deviations))
    print(f"written to {config.output}")


if __name__ == "__main__":
    main()
