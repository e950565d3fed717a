"""How good are reward models?   python -m reward.evaluate --model A [B …] --data_path PREFERENCES [--output FOLDER]

On held-out preferences (a folder's *valid* files, else all of a file): accuracy overall and by subset, calibration,
distribution of score differences, length bias and, of several models, their agreement. A table on the terminal; in
--output evaluation.json and plots.
"""

import os

from reward.evaluation.flags import EvaluateConfig
from utils.flags.parser import entry_point, parse_args


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m reward.evaluate`; one process."""
    config = parse_args(EvaluateConfig, argv)
    from reward.evaluation.plots import check_plots, draw_calibration, draw_differences, draw_lengths
    from reward.evaluation.report import evaluation_report, render
    from reward.evaluation.score_preferences import held_out_preferences, score_preferences
    from utils.files import check_writable, write_result

    if config.output:
        check_writable(config.output, "--output")
        check_plots()
    scored = score_preferences(held_out_preferences(config), config, print)
    models = dict(zip(config.model, scored, strict=True))
    report = evaluation_report(models, config.data_path)
    print(render(report))
    if config.output:
        write_result(os.path.join(config.output, "evaluation.json"), "--output", report)
        for draw in (draw_differences, draw_calibration, draw_lengths):
            draw(models, os.path.join(config.output, f"{draw.__name__.removeprefix('draw_')}.png"))
        print(f"written to {config.output}")


if __name__ == "__main__":
    main()
