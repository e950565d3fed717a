"""Report of PPO runs, finished or in progress: `python -m ppo.report RUN [RUN ...] [--output report.html]`.

Reads a run's folder and comparison.json of `ppo.compare`. Writes one self-contained HTML page, and curves.png beside
it.
"""

import base64
import html
import io
import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from utils.errors import UserError
from utils.files import atomic_file, check_output_file, parse_row, read_bytes, read_json
from utils.flags.parser import FlagParser, entry_point
from utils.html import html_page, html_table
from utils.schema import Count, Schema
from utils.terminal import printable

NUM_SAMPLES = 12
PANELS = {
    "score_mean": "score of the reward model",
    "kl_ref": "KL to the reference, nats per response",
    "response_length": "response length, tokens",
    "value_loss": "value loss",
}
BODY = """<img alt="Curves of score, KL, response length and value loss by step" src="data:image/png;base64,{picture}">
{sections}"""


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Writes the page and the picture, and prints where they are."""
    parser = FlagParser(allow_abbrev=False, description="Write an HTML page with curves, table and samples of PPO runs")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run (its --model_save_path)")
    parser.add_argument("--output", type=Path, help="page to write; default: report.html in the first RUN")
    arguments = parser.parse_args(argv)
    from reward.evaluation.plots import check_plots  # imports torch, which takes seconds

    runs = {str(folder): read_run(folder) for folder in arguments.runs}
    output = arguments.output or arguments.runs[0] / "report.html"
    check_plots()
    check_output_file(str(output), "--output")
    picture = draw(runs)
    sections = "\n".join(section(name, run) for name, run in runs.items())
    body = BODY.format(sections=sections, picture=base64.b64encode(picture).decode())
    with atomic_file(str(output), "--output") as file:
        file.write(printable(html_page(", ".join(runs), body)))
        output.with_name("curves.png").write_bytes(picture)
    print(f"written: {output} (open it in a browser), {output.with_name('curves.png')}")


_Number = Annotated[float, Field(allow_inf_nan=True)]


class _RunConfig(Schema):
    critic_pretrain_steps: Count = 0


class _Answer(Schema):
    prompt: str
    answer: str
    answer_after: str


class _Comparison(Schema):
    table: dict[str, dict[str, Annotated[list[_Number], Field(min_length=3, max_length=3)]]]
    answers: list[_Answer]


def read_run(folder: Path) -> dict:
    """Returns {"config", "metrics", "samples", "comparison" (or None)} of a run; UserError without a step of PPO."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not the folder of a run (no config.json there): give its --model_save_path")
    metrics = read_lines(folder / "metrics.jsonl")
    if not any(name in row for row in metrics for name in PANELS):
        raise UserError(f"{folder}/metrics.jsonl has no step of a PPO run yet: wait until the first step has been made")
    config, samples = read_json(folder / "config.json", "RUN", _RunConfig), read_lines(folder / "samples.jsonl")
    file = folder / "comparison.json"
    comparison = read_json(file, "RUN", _Comparison) if os.path.lexists(file) else None
    return {"config": config, "metrics": metrics, "samples": samples, "comparison": comparison}


def read_lines(file: Path) -> list[dict]:
    """Returns the lines of a .jsonl file that a run wrote, without one that is not finished; [] without a file."""
    lines = read_bytes(file).split(b"\n")[:-1] if file.is_file() else []
    return [row for line in lines if (row := parse_row(line))]


def is_number(value: Any) -> bool:
    """Whether a value can be drawn; a line that looks like a run's may have any value."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def draw(runs: dict[str, dict]) -> bytes:
    """Returns a PNG picture: one panel per metric, one line per run, dots for evaluations on held-out prompts."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS.items(), strict=True):
        for number, (name, run) in enumerate(runs.items()):
            for key, style in ((metric, "-"), (f"eval_{metric}", "o")):
                points = [(row["step"], row[key]) for row in run["metrics"] if is_number(row.get(key))]
                legend = printable(name) if style == "-" else "held-out prompts"
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=legend) if points else None
            axes.axvline(run["config"].get("critic_pretrain_steps", 0), color="grey", linestyle=":", linewidth=0.8)
        axes.set_title(label, fontsize="medium")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].legend(fontsize="small")
    figure.supxlabel("step (left of the dotted line only the critic trains)", fontsize="medium")
    figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


def section(name: str, run: dict) -> str:
    """Returns the HTML of one run: comparison, samples, flags."""
    table, keys, rows = "", ("step", "prompt", "answer", "score"), run["samples"][-NUM_SAMPLES:]
    if comparison := run["comparison"]:
        columns = ("before", "after", "difference")
        cells = {key: [row.get(column) for column in columns] for key, row in comparison["table"].items()}
        texts = [[key, *("{:.3f} [{:.3f}, {:.3f}]".format(*x) if x else "" for x in xs)] for key, xs in cells.items()]
        table = f"<h3>{len(comparison['answers'])} held-out prompts, 95 % intervals</h3>\n"
        table += html_table(["", *columns], texts)
        keys, rows = ("prompt", "answer", "answer_after"), comparison["answers"][:NUM_SAMPLES]
    samples = html_table(keys, [[row[key] for key in keys] for row in rows if row.keys() >= set(keys)])
    flags = html.escape(json.dumps(run["config"], indent=2, ensure_ascii=False))
    return f"""<h2>{html.escape(name)}</h2>
{table}
<h3>Samples, not picked</h3>
{samples}
<details><summary>Flags and versions</summary><pre>{flags}</pre></details>"""


if __name__ == "__main__":
    main()
