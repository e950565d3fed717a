"""Evaluate the claims on the stored results:   python -m experiments.report

Writes experiments/RESULTS.md (verdicts with intervals), plots in experiments/results, and experiments/report.html, a
page without external files. Figures with missing runs are marked.
"""

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from experiments.claims import FIGURES
from experiments.criteria import Claim, Figure, between, end
from experiments.curves import BIN, RESULTS, Run, load_runs
from experiments.intervals import over_seeds
from experiments.settings import load_flags
from ppo.alarms import alarms
from ppo.config import PPOConfig

FOLDER = Path(__file__).parent
PANELS = {
    "score_mean": "proxy score", "gold": "gold score", "kl_ref": "KL to the reference, nats per response",
    "response_length": "response length, tokens", "perplexity": "perplexity",
    "paper_perplexity": "the paper's perplexity", "entropy": "entropy, nats per token", "value_loss": "value loss",
    "policy_loss": "policy loss",
}  # fmt: skip
SMOOTH = 5  # bins of moving averages
FALL = 0.1  # decrease of gold below its best fifty steps that counts as a fall
VERDICTS = ("confirmed", "refuted", "undecided")
AT_END = {"score_mean": "score", "gold": "gold", "kl_ref": "KL", "eos_fraction": "share that ends by itself"}
ALARMS = PPOConfig(
    policy_model_path="-", critic_model_path="-", data_path="-", maxlen_res=load_flags("base")["maxlen_res"]
)  # at their defaults


def runs_of(figure: Figure) -> dict[str, list[Run]] | None:
    """Returns setting -> runs, or None if a run is missing."""
    runs = {setting: load_runs(setting, seeds) for setting, seeds in figure.settings.items()}
    return runs if all(len(runs[setting]) == seeds for setting, seeds in figure.settings.items()) else None


def number(mean: float, half: float) -> str:
    """Returns a mean with its interval as text."""
    return f"{mean:.3g} [{mean - half:.3g}, {mean + half:.3g}]"


def plot(name: str, runs: dict[str, list[Run]]) -> Path:
    """Plots the paper's panels: the mean over seeds and the range from the lowest to the highest seed."""
    figure, axes = plt.subplots(3, 3, figsize=(12, 8), constrained_layout=True)
    for axis, (metric, label) in zip(axes.flat, PANELS.items(), strict=True):
        for index, (setting, of_seeds) in enumerate(runs.items()):
            if metric not in of_seeds[0].curves:  # of the critic, in runs without one
                continue
            curves = [run.smooth(metric, SMOOTH) for run in of_seeds]
            steps = [BIN * (place + SMOOTH) for place in range(len(curves[0]))]
            columns = list(zip(*curves, strict=True))
            axis.plot(steps, list(map(fmean, columns)), label=setting, linewidth=1.2, color=f"C{index}")
            lowest, highest = list(map(min, columns)), list(map(max, columns))
            axis.fill_between(steps, lowest, highest, alpha=0.2, color=f"C{index}")
        axis.set_title(label, fontsize=9)
        axis.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=7)
    path = RESULTS / f"figure_{name}.png"
    figure.savefig(path, dpi=70)
    plt.close(figure)
    return path


@dataclass(frozen=True)
class Table:
    """A table of texts; the first row is the header."""

    rows: list[list[str]]

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        escaped = ([cell.replace("|", "\\|") for cell in row] for row in self.rows)
        head, *rows = [f"| {' | '.join(row)} |" for row in escaped]
        return "\n".join([head, "|" + "---|" * len(self.rows[0]), *rows])

    def html(self) -> str:
        """Returns the table as HTML; cells with verdicts have a class."""
        lines = []
        for index, row in enumerate(self.rows):
            tag = "td" if index else "th"
            kinds = (f' class="{cell}"' if cell in VERDICTS else "" for cell in row)
            cells = "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))
            lines.append(f"<tr>{cells}</tr>")
        return "<table>" + "\n".join(lines) + "</table>"


def verdicts(claims: list[Claim], runs: dict[str, list[Run]]) -> Table:
    """Returns a table of claims and their criteria with verdicts."""
    rows = [["claim or criterion", "bound", "measured (95 % over seeds)", "verdict"]]
    for claim in claims:
        rows.append([claim.text, "", "", claim.evaluate(runs)])
        for criterion in claim.criteria:
            verdict, mean, half = criterion.evaluate(runs)
            rows.append([f"– {criterion.text}", criterion.bound, number(mean, half), verdict])
    return Table(rows)


def parts(figure: Figure, runs: dict[str, list[Run]]) -> Table:
    """Returns a table of the differences between a setting without one part and the whole one, at the same step."""
    rows = [["without", *(f"{name} at the end, without - with" for name in AT_END.values())]]
    for setting, part in figure.parts.items():
        differences = (between(setting, figure.whole, end(metric))(runs) for metric in AT_END)
        rows.append([part, *(number(*over_seeds(values)) for values in differences)])
    return Table(rows)


def frontiers(figure: Figure, runs: dict[str, list[Run]]) -> Table:
    """Returns a table of KL and gold at the end, one row per estimator and KL weight."""
    rows = [["estimator", "KL weight", "KL at the end", "gold at the end"]]
    for name, settings in figure.frontiers.items():
        for setting in settings:
            ends = ([run.end(metric) for run in runs[setting]] for metric in ("kl_ref", "gold"))
            weight = str(load_flags(setting)["kl_penalty_weight"])
            rows.append([name, weight, *(number(*over_seeds(values)) for values in ends)])
    return Table(rows)


def plot_frontiers(name: str, figure: Figure, runs: dict[str, list[Run]]) -> Path:
    """Plots gold against KL at the end, means over seeds, one line per estimator with a point per KL weight."""
    shown, axis = plt.subplots(figsize=(7, 5), constrained_layout=True)
    for label, settings in figure.frontiers.items():
        points = sorted(
            tuple(fmean(run.end(metric) for run in runs[setting]) for metric in ("kl_ref", "gold"))
            for setting in settings
        )
        axis.plot(*zip(*points, strict=True), "o-", label=label, linewidth=1.2)
    axis.set_xlabel("KL to the reference at the end, nats per response")
    axis.set_ylabel("gold score at the end")
    axis.legend(fontsize=8)
    path = RESULTS / f"figure_{name}.png"
    shown.savefig(path, dpi=70)
    plt.close(shown)
    return path


def fall_of(run: Run) -> tuple[int, float] | None:
    """Returns (first step at which the fifty-step mean of gold is FALL below its previous maximum, KL), or None."""
    best = float("-inf")
    for index, (gold, kl) in enumerate(zip(run.smooth("gold", SMOOTH), run.smooth("kl_ref", SMOOTH), strict=True)):
        best = max(best, gold)
        if gold < best - FALL:
            return BIN * (index + SMOOTH), kl
    return None


def alarm_of(run: Run) -> int | None:
    """Returns the first step with an alarm of train_ppo.py, computed on means over ten steps, or None."""
    for index, values in enumerate(zip(*run.curves.values(), strict=True), start=1):
        if alarms(dict(zip(run.curves, values, strict=True)), ALARMS):
            return BIN * index
    return None


def alarm_table() -> Table:
    """Returns a table that compares alarms of train_ppo.py with falls of the gold score, over all stored runs.

    Without those with long answers, whose reward is another: their policies may well leave the gold score behind.
    """
    head = "setting, runs, falls, fall at step, KL at the fall, alarm at step, alarms before the fall, without a fall"
    rows = [head.split(", ")]
    for setting in sorted(file.stem for file in RESULTS.glob("*.json") if not file.stem.startswith("long")):
        runs = load_runs(setting)
        falls, alarmed = [fall_of(run) for run in runs], [alarm_of(run) for run in runs]
        seen = [fall for fall in falls if fall]
        ahead = sum(bool(fall and alarm and alarm <= fall[0]) for fall, alarm in zip(falls, alarmed, strict=True))
        false = sum(bool(alarm and not fall) for fall, alarm in zip(falls, alarmed, strict=True))
        steps, kls = ", ".join(str(step) for step, _ in seen), ", ".join(f"{kl:.0f}" for _, kl in seen)
        at = ", ".join(str(alarm) for alarm in alarmed if alarm)
        rows.append([setting, str(len(runs)), str(len(seen)), steps, kls, at, str(ahead), str(false)])
    return Table(rows)


def facts(runs: dict[str, list[Run]]) -> str:
    """Returns number, time, commits and machines of the runs as text."""
    every = [run for of_seeds in runs.values() for run in of_seeds]
    minutes = sum(run.seconds for run in every) / 60
    commits, machines = (sorted({getattr(run, name) for run in every}) for name in ("commit", "machine"))
    where = f"on one core ({' and '.join(machines)})"
    return f"{len(every)} runs, {minutes:.0f} min in total {where}, at commit {', '.join(commits)}"


def main(figures: list[str] | None = None) -> None:
    """Writes the files and prints the verdicts of `figures` (default: all)."""
    texts = ["# Results", (FOLDER / "introduction.md").read_text("utf-8").strip()]
    page = [f"<h1>The paper's findings, on two cores</h1>{paragraphs(texts[1])}"]
    for name, figure in FIGURES.items():
        runs, title = runs_of(figure), (f"Figure {name}: " if name.isdigit() else "Beyond the paper: ") + figure.title
        if runs is None:
            texts.append(f"## {title}\n\nNot run yet: `python -m experiments.run --figure {name}`.")
            continue
        path = plot_frontiers(name, figure, runs) if figure.frontiers else plot(name, runs)
        where = f"`python -m experiments.run --figure {name}`: {facts(runs)}."
        tables = [verdicts(figure.claims, runs)] * bool(figure.claims) + [parts(figure, runs)] * bool(figure.parts)
        tables += [frontiers(figure, runs)] * bool(figure.frontiers)
        shown = "\n\n".join(table.markdown() for table in tables)
        if not figures or name in figures:
            print(f"\n{title}\n{shown}")
        texts.append(f"## {title}\n\n{where}\n\n{shown}\n\n![{title}](results/{path.name})")
        data = base64.b64encode(path.read_bytes()).decode()
        page.append(f"<h2>{html.escape(title)}</h2>{paragraphs(where)}{''.join(table.html() for table in tables)}")
        page.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    table = alarm_table()
    words = (
        f"A fall: the fifty-step mean of gold is {FALL:g} below its previous maximum. Alarms use the defaults of "
        f"train_ppo.py (`--alarm_kl {ALARMS.alarm_kl:g}`, one nat per token of the longest answer, and "
        f"`--alarm_perplexity {ALARMS.alarm_perplexity:g}`) on means over ten steps."
    )
    texts.append(f"## Beyond the paper: do the alarms precede the fall?\n\n{words}\n\n{table.markdown()}")
    page.append(f"<h2>Do the alarms precede the fall?</h2>{paragraphs(words)}{table.html()}")
    (FOLDER / "RESULTS.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    (FOLDER / "report.html").write_text(PAGE.format(body="\n".join(page)), encoding="utf-8")
    print(f"\nwritten: {FOLDER}/RESULTS.md, {FOLDER}/report.html")


def paragraphs(text: str) -> str:
    """Returns Markdown paragraphs with inline code as HTML."""
    marked = (re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(part)) for part in text.split("\n\n"))
    return "".join(f"<p>{part}</p>" for part in marked)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>PPO-max: the paper's findings, on two cores</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-size: 14px; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #ddd; padding: 4px 10px; text-align: left; vertical-align: top }}
.confirmed {{ color: #17692b; font-weight: 600 }}
.refuted {{ color: #a11; font-weight: 600 }}
.undecided {{ color: #865c00 }}
img {{ width: 100% }} code {{ background: #f3f3f3 }}
</style></head><body>
{body}
</body></html>
"""


if __name__ == "__main__":
    main()
