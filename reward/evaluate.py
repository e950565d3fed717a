"""How good are reward models?   python -m reward.evaluate --model A [B …] --data_path PREFERENCES [--output FOLDER]

On held-out preferences (a folder's *valid* files, else all of a file): accuracy overall and by subset, calibration,
distribution of score differences, length bias and, of several models, their agreement. A table on the terminal; in
--output evaluation.json and plots.
"""

import os
from dataclasses import dataclass, field

from data.preferences import Preference, load_preferences
from reward.evaluation.plots import check_plots, draw_calibration, draw_differences, draw_lengths
from reward.evaluation.report import evaluation_report, render
from reward.evaluation.score_preferences import PanelConfig, score_preferences
from utils.errors import UserError
from utils.files import check_writable, write_json
from utils.flags.parser import entry_point, parse_args


@dataclass
class EvaluateConfig(PanelConfig):
    """Evaluate reward models on preferences."""

    output: str = ""
    """Folder for evaluation.json and plots; default: the table alone"""
    subsets: list[str] = field(default_factory=list)
    """Only these; a record's subset is its `subset`, else its file's name without train or valid"""


def held_out_preferences(config: EvaluateConfig) -> list[Preference]:
    """The valid part of --data_path, or all of it where there is none. UserError for a subset without a record."""
    train, valid = load_preferences(config.data_path, 0, 0)
    preferences = valid or train
    print(f"evaluated on the {'held-out' if valid else 'whole'} data: {len(preferences)} preferences")
    there = sorted({preference.subset for preference in preferences})
    for subset in config.subsets:
        if subset not in there:
            raise UserError(f"--subsets {subset}: no preference of --data_path is in it; there are {', '.join(there)}")
    return [p for p in preferences if not config.subsets or p.subset in config.subsets]


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m reward.evaluate`; one process."""
    config = parse_args(EvaluateConfig, argv)
    if config.output:
        check_writable(config.output, "--output")
        check_plots()
    scored = score_preferences(held_out_preferences(config), config, print)
    models = dict(zip(config.model, scored, strict=True))
    report = evaluation_report(models, config.data_path)
    print(render(report))
    if config.output:
        write_json(os.path.join(config.output, "evaluation.json"), report, "--output")
        for draw in (draw_differences, draw_calibration, draw_lengths):
            draw(models, os.path.join(config.output, f"{draw.__name__.removeprefix('draw_')}.png"))
        print(f"written to {config.output}")


if __name__ == "__main__":
    main()
