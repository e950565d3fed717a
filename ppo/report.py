"""Report of runs of any stage, finished or in progress: `python -m ppo.report RUN [RUN ...] [--output report.html]`.

Reads a run's folder, and comparison.json of `ppo.compare` in it. Writes one self-contained HTML page.
"""

import math
from dataclasses import fields
from pathlib import Path

from ppo.alarms import MEANINGS, is_best, past_limits
from ppo.flags.monitoring import AlarmFlags
from utils.files import check_output_file
from utils.flags.parser import FlagParser, entry_point
from utils.report.choose import is_number
from utils.report.page import write_report
from utils.report.read import MAX_SAMPLES, RunFiles, read_run
from utils.report.verdict import judge_supervised, number
from utils.run.index import REPORT


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Writes the page and prints where it is."""
    parser = FlagParser(allow_abbrev=False, description="Write an HTML page with the curves and samples of runs")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run (its --model_save_path)")
    parser.add_argument("--output", type=Path, help="page to write; default: report.html in the first RUN")
    arguments = parser.parse_args(argv)
    folders = list(dict.fromkeys(arguments.runs))
    runs = [read_run(folder, MAX_SAMPLES // len(folders)) for folder in folders]
    for run in runs:
        judge(run)
    output = arguments.output or folders[0] / REPORT
    check_output_file(str(output), "--output")
    write_report(runs, str(output), "--output")
    print(f"written: {output} (open it in a browser)")


def judge(run: RunFiles) -> None:
    """Finds the evaluation that best/ has, and says what alarms and rollbacks mean."""
    if run.stage != "ppo":
        judge_supervised(run)
        return
    limits = _limits(run.config)
    past = [(row, name, flag) for row in run.metrics for name, flag in past_limits(_numbers(row), limits)]
    alarmed = {row["step"] for row, _, _ in past}
    run.best, run.num_alarms = _best(run, alarmed), len(alarmed)
    run.remarks += [_alarm_text(name, flag, past, limits) for name, flag in dict.fromkeys(x[1:] for x in past)]
    count = run.num_rollbacks
    if not past:
        found = f"No alarm{' in the steps that are shown' if count else ''}"
        run.remarks.append(f"{found}: KL, perplexity and the other signs of a collapse stayed within their limits.")
    if count:
        run.remarks.append(
            f"Rollbacks: {count:g}. After an alarm the run went back to a checkpoint and took other prompts; the steps "
            "that were taken back are not shown, and best/ may be of one of them."
        )


def _limits(config: dict) -> AlarmFlags:
    """Returns the thresholds of a run; one that is no number is off."""
    names = {field.name for field in fields(AlarmFlags)}
    limits = AlarmFlags(**{name: config[name] for name in names & config.keys() if is_number(config[name])})
    limits.alarm_kl = math.inf if limits.alarm_kl is None else limits.alarm_kl
    return limits


def _numbers(row: dict) -> dict[str, float]:
    """Returns the numbers of a step; what is missing is NaN, which is past no limit."""
    found = {key: row[key] if is_number(row.get(key)) else math.nan for key in MEANINGS}
    return found | {key: row[key] for key in row.keys() & {"policy_loss"}}  # absent while only the critic trains


def _best(run: RunFiles, alarmed: set[int]) -> dict | None:
    best, max_kl = None, run.config.get("best_max_kl", math.inf)
    for row in run.metrics:
        values = {key: row.get(f"eval_{key}") for key in ("score_mean", "kl_ref")}
        if row["step"] not in alarmed and all(map(is_number, values.values())):
            best = row if is_best(values, best["eval_score_mean"] if best else -math.inf, max_kl) else best
    return best


def _alarm_text(name: str, flag: str, past: list[tuple[dict, str, str]], limits: AlarmFlags) -> str:
    """Returns a sentence about all alarms of a metric."""
    rows = [row for row, other, _ in past if other == name]
    limit, far, worst = getattr(limits, flag), *(("up", max) if flag == "alarm_kl" else ("down", min))
    first, last = (rows[i]["step"] for i in (0, -1))
    when = f"step {first}" if len(rows) == 1 else f"{len(rows)} steps between {first} and {last}"
    return (
        f"Alarm: {name} was past --{flag} {limit:g} at {when}, {far} to {number(worst(row[name] for row in rows))}: "
        f"{MEANINGS[name]}. Read the samples of these steps."
    )


if __name__ == "__main__":
    main()
