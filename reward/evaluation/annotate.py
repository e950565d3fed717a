"""Preference strength: columns of score differences over an ensemble of reward models, and their summary."""

import statistics
from pathlib import Path

from data.formats.ranked_answers import is_ranked
from data.formats.records import BadRecord, Record, Tally
from data.formats.score_columns import CHOSEN_SCORES, DEVIATION, REJECTED_SCORES, STRENGTH
from data.preferences import Preference, preference_of
from reward.metrics import Scored
from utils.errors import UserError

ROWS, WIDTH = 12, 40  # of the histogram in text


def pairs_of(records: list[Record]) -> dict[int, Preference]:
    """Place of a record -> its pair. What cannot be scored is counted and said: it is written as it stands."""
    pairs, tally = {}, Tally("preferences")
    for place, record in enumerate(records):
        try:
            preference = preference_of(record, tally)
        except BadRecord as error:
            tally.add(f"left as they are: {error}", record.source)
            continue
        if is_ranked(record.value):
            tally.add("left as they are: ranked answers have no columns of strength", record.source)
        else:
            pairs[place] = preference
    for line in tally.lines():
        print(line)
    if not pairs:
        raise UserError(f"--data_path: no pair to score ({'; '.join(tally.lines())}); correct them")
    return pairs


def strength_columns(models: list[Scored]) -> dict[int, dict]:
    """Place of a pair -> its new columns. The deviation is the population's, as in Part II."""
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
    """A record with its new columns in the place of old ones, whichever way those were spelt."""
    return {key: x for key, x in value.items() if key.replace("_", " ") not in columns} | columns


def file_name(record: Record, split: str) -> str:
    """The name under which a record is written: its file's, as .jsonl; the split's for a data set of the hub."""
    source = Path(record.source.rpartition(":")[0])
    return f"{source.stem if source.exists() else split}.jsonl"


def summary(means: list[float], deviations: list[float]) -> str:
    """The distribution of mean strengths in words and as a histogram in text."""
    negative = sum(mean < 0 for mean in means)
    lines = [
        f"mean preference difference of {len(means)} pairs: mean {statistics.fmean(means):.3f}, "
        f"deviation {statistics.pstdev(means):.3f}; below 0: {negative} ({negative / len(means):.1%})",
        f"deviation over the models: mean {statistics.fmean(deviations):.3f}",
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
