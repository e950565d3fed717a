"""Evaluate reward models:   python -m reward.evaluate --model A [B …] --data_path PREFERENCES [--output FOLDER]

Uses the *valid* files of a folder, otherwise all data. Prints a table; writes evaluation.json and plots to --output.
"""

import os

from reward.evaluation.flags import EvaluateConfig
from utils.flags.parser import entry_point, parse_args


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m reward.evaluate`; runs in one process."""
    config = parse_args(EvaluateConfig, argv)
    from reward.evaluation.plots import check_plots, draw_calibration, draw_differences, draw_lengths
    from reward.evaluation.report import evaluation_report, render
    from reward.evaluation.score_preferences import load_evaluation_set, score_preferences
    from utils.files import check_writable, write_json

    if config.output:
        check_writable(config.output, "--output")
        check_plots()
    preferences = load_evaluation_set(config)
    scored = score_preferences(preferences, config, print)
    models = dict(zip(config.model, scored, strict=True))
    report = evaluation_report(models, " ".join(config.data_path), preferences)
    print(render(report))
    if config.output:
        write_json(os.path.join(config.output, "evaluation.json"), report, "--output")
        for draw in (draw_differences, draw_calibration, draw_lengths):
            draw(models, os.path.join(config.output, f"{draw.__name__.removeprefix('draw_')}.png"))
        print(f"written to {config.output}")


if __name__ == "__main__":
    main()
