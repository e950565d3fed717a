"""Add preference strengths to records, and summarise them; used by reward.strength."""

import os
import statistics

import torch

from data.formats.columns import PLAIN, FormOptions, map_columns
from data.formats.preference_forms import form_of
from data.formats.records import BadRecord, Record, Tally
from data.formats.score_columns import CHOSEN_SCORES, DEVIATION, REJECTED_SCORES, STRENGTH
from data.preferences import Preference, parse_preferences
from reward.metrics import ScoredItems
from utils.data_files import stem_of
from utils.errors import UserError

ROWS, WIDTH = 12, 40  # size of the text histogram


def pairs_of(records: list[Record], options: FormOptions = PLAIN) -> dict[int, Preference]:
    """Returns record index -> preference; reports the records that cannot be scored and stay unchanged."""
    pairs, tally = {}, Tally("preferences")
    for place, record in enumerate(records):
        try:
            preferences = parse_preferences(record, tally, options=options)
        except BadRecord as error:
            tally.add(f"not changed: {error}", record.source)
            continue
        form = form_of(map_columns(record.value, options))
        if form.pair:
            (pairs[place],) = preferences
        else:
            tally.add(f"not changed: {form.name} have no strength columns", record.source)
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
    file = record.source.rpartition(":")[0]
    return f"{stem_of(file) if os.path.exists(file) else split}.jsonl"


def summary(means: list[float], deviations: list[float]) -> str:
    """Returns statistics and a text histogram of the mean strengths."""
    negative = sum(mean < 0 for mean in means)
    lines = [
        f"mean preference difference of {len(means)} pairs: mean {statistics.fmean(means):.3f}, "
        f"std {statistics.pstdev(means):.3f}; below 0: {negative} ({negative / len(means):.1%})",
        f"std over the models: mean {statistics.fmean(deviations):.3f}",
    ]
    low, high = min(means), max(means)
    width = (high - low) / ROWS
    counts = torch.histc(torch.tensor(means, dtype=torch.float64), ROWS, low, high).int().tolist()
    for k, count in enumerate(counts):
        bar = "#" * round(WIDTH * count / max(counts))
        lines.append(f"{low + k * width:9.3f} to {low + (k + 1) * width:8.3f}  {count:7} {bar}")
    return "\n".join(lines)
