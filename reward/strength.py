"""Measure preference strength:   python -m reward.strength --model A B C … --data_path PREFERENCES --output FOLDER

Several reward models, trained on the same preferences with different seeds, score both answers of each pair (Part II
§2). Adds mean and deviation of the score difference and all scores to each record, for `reward.train`.
"""

import os
from collections import defaultdict
from pathlib import Path

from reward.evaluation.flags import StrengthConfig
from utils.flags.parser import entry_point, parse_args


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m reward.strength`; runs in one process."""
    config = parse_args(StrengthConfig, argv)
    from data.encoded import form_options
    from data.formats.json_lines import json_line
    from data.formats.score_columns import DEVIATION, STRENGTH
    from data.sources import read_records
    from reward.evaluation.annotate import annotated, file_name, pairs_of, strength_columns, summary
    from reward.evaluation.plots import check_plots, draw_strengths
    from reward.evaluation.score_preferences import score_preferences
    from utils.files import atomic_folder, check_writable

    check_writable(config.output, "--output")
    check_plots()
    splits = dict(zip(("train", "valid"), read_records(config.data_path, config), strict=True))
    records = [(split, record) for split, part in splits.items() for record in part or []]
    pairs = pairs_of([record for _, record in records], form_options(config))
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
