"""The head of a report in words: how far a run is, which step is best, what it has gained. HTML-free texts."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from utils.report.choose import is_number
from utils.report.read import RunFiles

LARGER_IS_BETTER = {"accuracy", "worst_subset_accuracy", "score_difference"}  # of the metrics that select best/
SCORES = ("reward model score", "reward_fn score")  # rows of a comparison
Tile = tuple[str, str, str]  # label, value, what it means


def number(value: float) -> str:
    """Returns a number with three digits, and a minus sign that is one."""
    return f"{value:.3g}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}".replace("-", "−")


def is_known(estimate: Sequence[float] | None) -> bool:
    """Returns whether an estimate and its interval are numbers; a comparison may have NaN."""
    return bool(estimate) and all(map(is_number, estimate))


def interval(estimate: Sequence[float] | None) -> str:
    """Returns an estimate with its 95 % interval."""
    if not is_known(estimate):
        return "unknown"
    middle, low, high = (number(value) for value in estimate)
    return f"{middle} [{low}, {high}]"


def bounds(estimate: Sequence[float]) -> str:
    """Returns the 95 % interval of an estimate in words."""
    return f"95 % interval {number(estimate[1])} to {number(estimate[2])}"


def before_after(policies: list[str]) -> str:
    """Returns which policies "before" and "after" are, the first two; "" if that is not known."""
    return "before: {}, after: {}".format(*policies) if len(policies) > 1 else ""


def held_out_interval(row: dict) -> list[float] | None:
    """Returns the mean score of an evaluation with its 95 % interval over prompts (normal approximation), or None."""
    mean, deviation, count = (row.get(f"eval_{key}") for key in ("score_mean", "score_std", "num_prompts"))
    if not all(map(is_number, (mean, deviation, count))) or count < 2:
        return None
    half = 1.96 * deviation / math.sqrt(count)
    return [mean, mean - half, mean + half]


def judge_supervised(run: RunFiles) -> None:
    """Finds the evaluation that best/ has, of an SFT or a reward run: the first one with the best value."""
    key = f"eval_{run.config.get('validation_metric', 'loss')}"
    rows = [row for row in run.metrics if is_number(row.get(key))]
    sign = 1 if key.removeprefix("eval_") in LARGER_IS_BETTER else -1
    run.best = max(rows, key=lambda row: sign * row[key], default=None)


def progress(run: RunFiles) -> str:
    """Returns a sentence that says how far the run is."""
    step, total = run.last_step, run.total_steps
    when = datetime.fromtimestamp(run.written, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if total and step >= total and run.has_final:
        return f"Finished: all {total} steps are done, and final/ holds the model after the last one."
    if run.trains_critic_only and run.has_final:
        return f"Finished: the target was reached at step {step}, and final/ holds the critic after it."
    of = f" of {total}" if total else ""
    return f"Not finished: step {step}{of}, written on {when}. The run goes on, or it was stopped there."


def tiles(run: RunFiles) -> list[Tile]:
    """Returns the figures at the head of the report."""
    total = run.total_steps
    found = [("Steps", f"{run.last_step} of {total}" if total else str(run.last_step), "")]
    if run.best:
        where = "best/ holds it" if run.has_best else "without a best/"
        found.append(("Best step", str(run.best["step"]), where))
    found += _ppo_tiles(run) if run.stage == "ppo" else _supervised_tiles(run)
    if run.num_alarms is not None:
        said = ["steps with signs of a collapse"] if run.num_alarms else []
        said += [f"in the steps that are shown; rollbacks: {run.num_rollbacks:g}"] if run.num_rollbacks else []
        found.append(("Alarms", str(run.num_alarms or "none"), ", ".join(said)))
    return found


def _ppo_tiles(run: RunFiles) -> list[Tile]:
    table = run.comparison["table"] if run.comparison else {}
    known = {name: [table.get(name, {}).get(key) for key in ("before", "after")] for name in SCORES}
    name = next((name for name, both in known.items() if all(map(is_known, both))), None)
    found, best = [], run.best or {}
    if name:
        before, after = known[name]
        which = before_after(run.policies) or "before → after"
        meaning = f"{name}, {which}, on {len(run.comparison['answers'])} prompts; after: {bounds(after)}"
        found.append(("Score", f"{number(before[0])} → {number(after[0])}", meaning))
    elif is_number(best.get("eval_score_mean")):
        estimate = held_out_interval(best)
        meaning = f"held out, at the best step{f', {bounds(estimate)}' if estimate else ''}"
        found.append(("Score", number(best["eval_score_mean"]), meaning))
    if is_known(kl := table.get("kl", {}).get("after")):
        found.append(("KL", number(kl[0]), f"nats per response, {bounds(kl)}"))
    elif is_number(best.get("eval_kl_ref")):
        found.append(("KL", number(best["eval_kl_ref"]), "nats per response, held out, at the best step"))
    return found


def _supervised_tiles(run: RunFiles) -> list[Tile]:
    best, found = run.best or {}, []
    for label, key in (("Loss", "loss"), ("Accuracy", "accuracy"), ("Accuracy of tokens", "token_accuracy")):
        rows = [row for row in run.metrics if is_number(row.get(f"eval_{key}"))]
        if rows and is_number(best.get(f"eval_{key}")):
            meaning = "held out, at the best step"
            if rows[0] is not best:
                meaning += f"; {number(rows[0][f'eval_{key}'])} at step {rows[0]['step']}"
            found.append((label, number(best[f"eval_{key}"]), meaning))
    if not found and (row := next((row for row in reversed(run.metrics) if is_number(row.get("loss"))), None)):
        found.append(("Loss", number(row["loss"]), f"of training, at step {row['step']}; there was no evaluation yet"))
    return found


def sentences(run: RunFiles) -> list[str]:
    """Returns what the head says in words: progress, gain, skipped batches, and the run's remarks."""
    found = [progress(run), *_gain(run), *run.remarks]
    if count := run.num_bad_batches:
        found.append(
            f"{count} bad batch{'es were' if count > 1 else ' was'} left out or stopped the run: a loss, gradient or "
            "score was not finite or too large. See bad_batches/."
        )
    return found


def _gain(run: RunFiles) -> list[str]:
    table = run.comparison["table"] if run.comparison else {}
    found, which = [], f" ({names})" if (names := before_after(run.policies)) else ""
    for name in SCORES:
        if not is_known(row := table.get(name, {}).get("difference")):
            continue
        words = "higher" if row[1] > 0 else "lower" if row[2] < 0 else None
        said = f"{words} after the training" if words else "not clearly higher or lower after the training"
        found.append(f"The {name} is {said}{which}: difference {interval(row)}, 95 % interval over prompts.")
    return found
