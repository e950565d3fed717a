"""The page of a report: head, panels, comparison, samples, flags of one run or of several."""

import html
import json
from pathlib import Path

from utils.files import atomic_file
from utils.html import html_page, html_table
from utils.report.charts import STYLES, Drawing, Series, series_of
from utils.report.comparison import comparison_html
from utils.report.panels import Panel, Plane, Stack, panels_of
from utils.report.read import RunFiles
from utils.report.samples import samples_html
from utils.report.verdict import number, sentences, tiles
from utils.terminal import printable

DASHES = ("━", "┅", "┈")  # how the styles of lines look in a legend
OWN_FILES = Path(__file__).parent


def write_report(runs: list[RunFiles], file: str, flag: str = "") -> None:
    """Writes the page of some runs. Raises UserError, which names `flag`, if it cannot be written."""
    page = page_of(runs)
    with atomic_file(file, flag) as stream:
        stream.write(page)


def page_of(runs: list[RunFiles]) -> str:
    """Returns the page. All texts of runs are escaped, and control characters in them are shown as such."""
    compared = '<h2 id="compared">Before and after, by ppo.compare</h2>' if any(run.comparison for run in runs) else ""
    parts = [_links(runs), *(_head(run, len(runs) > 1) for run in runs), _panels(runs)]
    parts += [compared, *map(comparison_html, runs), samples_html(runs)]
    parts += ['<h2 id="flags">Flags</h2>', *map(_flags, runs)]
    body = "\n".join(filter(None, parts))
    style, script = ((OWN_FILES / name).read_text("utf-8") for name in ("page.css", "page.js"))
    title = ", ".join(run.name for run in runs)
    return printable(html_page(title, body, style, script if any(run.samples for run in runs) else ""))


def _links(runs: list[RunFiles]) -> str:
    names = {"curves": "Curves", "compared": "Comparison", "samples-of": "Samples", "flags": "Flags"}
    there = {"compared": any(run.comparison for run in runs), "samples-of": any(run.samples for run in runs)}
    links = (f'<a href="#{key}">{name}</a>' for key, name in names.items() if there.get(key, True))
    return f"<nav>{''.join(links)}</nav>"


def _head(run: RunFiles, several: bool) -> str:
    cards = "".join(
        f'<div><span class="small">{html.escape(label)}</span><b>{html.escape(value)}</b>'
        f'<span class="small">{html.escape(meaning)}</span></div>'
        for label, value, meaning in tiles(run)
    )
    said = "".join(f"<li>{html.escape(text)}</li>" for text in sentences(run))
    heading = f"<h2>{html.escape(run.name)}</h2>\n" if several else ""
    return f'{heading}<div class="tiles">{cards}</div>\n<ul>{said}</ul>'


def _panels(runs: list[RunFiles]) -> str:
    drawing, figures = Drawing(), []
    shaded = {run.config.get("critic_pretrain_steps", 0) for run in runs}
    critic_only = shaded.pop() if len(shaded) == 1 else 0
    every = [row["step"] for run in runs for row in run.metrics]
    for panel in panels_of([run.metrics for run in runs]):
        if series := series_of(panel, runs):
            picture = drawing.svg(panel, series, (min(every), max(every)), critic_only)
            figures.append(_figure(panel, series, picture, many=len(runs) > 1))
    keys = "".join(f'<span class="c{i % 6}">━ {html.escape(run.name)}</span> ' for i, run in enumerate(runs))
    notes = ["Lines: training. Dots: held-out data."]
    notes += ["Shaded: only the critic trains."] if critic_only else []
    legend = f"<p>{keys}</p>" if len(runs) > 1 else ""
    return f"""<h2 id="curves">Curves by step</h2>
<p>{" ".join(notes)}</p>{legend}
<div class="panels">
{"".join(figures)}
</div>"""


def _figure(panel: Panel, series: list[Series], picture: str, many: bool) -> str:
    """Returns a panel with its caption: title, names of lines, what to look for."""
    marks = {}
    for line in series:
        sign = "■" if isinstance(panel, Stack) else DASHES[line.style % len(STYLES)]
        mark = sign if many else f'<span class="c{line.colour}">{sign}</span>'
        if line.label:
            marks.setdefault(line.label, f"{mark} {html.escape(line.label)}")
    names = f" <span>{' '.join(marks.values())}</span>" if len(marks) > 1 else ""
    title, hint = html.escape(panel.title), f'<div class="small">{html.escape(panel.hint)}</div>' if panel.hint else ""
    described = html.escape(f"{panel.title}: {_description(panel, series)}")
    picture = picture.replace("<svg ", f'<svg role="img" aria-label="{described}" ', 1)
    return f"<figure><figcaption>{title}{names}</figcaption>{picture}{hint}</figure>\n"


def _description(panel: Panel, series: list[Series]) -> str:
    """Returns the ends of each line in words, for those who cannot see it."""
    kinds = ((line, name, values) for line in series for name, values in _kinds(line))
    where = "KL" if isinstance(panel, Plane) else "step"
    return "; ".join(
        f"{' '.join(filter(None, (line.label, name)))} from {number(values[0][1])} at {where} {values[0][0]:.4g} to "
        f"{number(values[-1][1])} at {where} {values[-1][0]:.4g}"
        for line, name, values in kinds
    )


def _kinds(line: Series) -> list[tuple[str, list]]:
    return [pair for pair in (("training", line.train), ("held out", line.held_out)) if pair[1]]


def _flags(run: RunFiles) -> str:
    """Returns the flags that differ from their defaults, and all of config.json, folded away."""
    changed = run.config.get("changed_flags", {})
    rows = [[f"--{name}", _shown(run.config.get(name)), _shown(default)] for name, default in changed.items()]
    table = html_table(["flag", "this run", "default"], rows) if rows else ""
    command = f"<p>Flags as given: <code>{html.escape(_words(run.config))}</code></p>" if not rows else ""
    every = html.escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    summary = f"{len(rows)} flags that differ from their defaults" if rows else "Flags of the command"
    return f"""<p>{html.escape(run.name)}</p>
<details><summary>{summary}</summary><div class="wide">{table}{command}</div></details>
<details><summary>All flags and versions</summary><pre>{every}</pre></details>"""


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _words(config: dict) -> str:
    argv = config.get("argv")
    return " ".join(map(str, argv)) if isinstance(argv, list) else ""
