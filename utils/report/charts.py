"""Draws panels as SVG that takes its colours from the page, and the picture of a model card as PNG.

No text of a run is drawn: names stand in the page, where they are escaped.
"""

import io
import os
import re
from dataclasses import dataclass, field

from utils.report.choose import points, thinned
from utils.report.panels import Panel, Plane, Stack
from utils.report.read import RunFiles

NUM_COLOURS = 6  # --c0 to --c5 in page.css
STYLES = ("solid", (0, (4, 2)), (0, (1, 1.5)))  # of a panel's first, second and third metric if there are several runs
# Stand-ins for colours, which `_clean` replaces: matplotlib has no names for those of the page.
INK, COLOUR = "#0a0b0c", "#0a0bf{}"
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "path.simplify": False, "lines.linewidth": 1.2,
    "lines.markersize": 4,
}  # fmt: skip
WIDTH, HEIGHT = 4.2, 2.2  # inches of 72 units
LEFT, BOTTOM, RIGHT, TOP = 38, 20, 6, 5  # units around the axes
TICK = '<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
PLAIN = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # no metadata
Line = list[tuple[float, float]]


@dataclass
class Series:
    """A line of a panel. held_out: points of evaluations, drawn as dots."""

    colour: int
    style: int
    label: str
    train: Line
    held_out: Line = field(default_factory=list)


def series_of(panel: Panel, runs: list[RunFiles]) -> list[Series]:
    """Returns the panel's lines: one colour per run, or one per metric if there is one run."""
    found = []
    for number, run in enumerate(runs):
        for place, (key, label) in enumerate(panel.keys.items()):
            x, style = "step", place if len(runs) > 1 else 0
            held_x = x
            if isinstance(panel, Plane):
                if place == 0:
                    continue
                x, held_x, style, label = next(iter(panel.keys)), f"eval_{next(iter(panel.keys))}", 0, ""
            colour = number if len(runs) > 1 else max(0, place - isinstance(panel, Plane))
            train, held_out = points(run.metrics, key, x), thinned(points(run.metrics, f"eval_{key}", held_x))
            if not isinstance(panel, Stack):  # its lines are added up first
                train = thinned(train)
            if train or held_out:
                found.append(Series(colour % NUM_COLOURS, style % len(STYLES), label, train, held_out))
    return found


os.environ.pop("MPLBACKEND", None)  # a notebook's, which commands that it starts inherit: pictures are files here


class Drawing:
    """One figure, which all panels of a page use in turn, without matplotlib's axes, which take most of the time."""

    def __init__(self):
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        self._settings = matplotlib.rc_context
        with self._settings(SETTINGS):
            figure = Figure(figsize=(WIDTH, HEIGHT))
            width, height = 72 * WIDTH, 72 * HEIGHT
            room = LEFT / width, BOTTOM / height, 1 - (LEFT + RIGHT) / width, 1 - (TOP + BOTTOM) / height
            self._canvas, self._axes = FigureCanvasSVG(figure), figure.add_axes(room)
            figure.patch.set_visible(False)
            self._axes.set_axis_off()
            self._steps = MaxNLocator(6, steps=[1, 2, 5, 10], integer=True)
            self._numbers = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])

    def svg(self, panel: Panel, series: list[Series], steps: tuple[int, int], critic_only: int = 0) -> str:
        """Returns the panel as an <svg>. steps: first and last; critic_only: steps at the start, which are shaded."""
        is_plane = isinstance(panel, Plane)
        with self._settings(SETTINGS):
            self._clear()
            if isinstance(panel, Stack):
                self._stack(series)
            else:
                self._lines(series, joined=is_plane)
            if critic_only and not is_plane:
                self._axes.axvspan(0.5, critic_only + 0.5, color=INK, alpha=0.08, linewidth=0)
            self._fit(series, None if is_plane else steps, from_zero=isinstance(panel, Stack))
            ticks = self._grid(self._numbers if is_plane else self._steps)
            self._canvas.print_svg(file := io.StringIO(), metadata=PLAIN)
        return _clean(file.getvalue()).replace("</svg>", f"{ticks}</svg>")

    def _clear(self) -> None:
        for artist in (*self._axes.lines, *self._axes.collections, *self._axes.patches):
            artist.remove()

    def _lines(self, series: list[Series], joined: bool) -> None:
        for line in series:
            colour = COLOUR.format(line.colour)
            if line.train:
                style = {"linestyle": STYLES[line.style], "alpha": 0.6 if joined else 0.9}
                self._axes.plot(*zip(*line.train, strict=True), color=colour, **style)
            if joined and line.train:  # without an axis of steps a dot says where the run is now
                self._axes.plot(*line.train[-1], marker="s", markersize=6, color=colour)
            if line.held_out:
                dots = {"linestyle": ":" if joined or not line.train else "", "linewidth": 0.8}
                self._axes.plot(*zip(*line.held_out, strict=True), marker="o", color=colour, **dots)

    def _stack(self, series: list[Series]) -> None:
        heights = dict.fromkeys((x for line in series for x, _ in line.train), 0.0)
        for line in series:
            below, values = heights.copy(), dict(line.train)
            heights = {x: y + values.get(x, 0.0) for x, y in heights.items()}
            xs = [x for x, _ in thinned(list(heights.items()))]
            tops, bottoms = [heights[x] for x in xs], [below[x] for x in xs]
            self._axes.fill_between(xs, bottoms, tops, color=COLOUR.format(line.colour), linewidth=0, alpha=0.75)
        if len(heights) == 1:
            self._axes.plot(*next(iter(heights.items())), "s", color=COLOUR.format(0))
        self._top = max(heights.values(), default=1.0)

    def _fit(self, series: list[Series], steps: tuple[int, int] | None, from_zero: bool) -> None:
        every = [point for line in series for point in (*line.train, *line.held_out)]
        xs, ys = zip(*every, strict=True)
        xs = steps or xs
        self._axes.set_xlim(*_margins(min(xs), max(xs), 0.02))
        self._axes.set_ylim(*((0, 1.05 * self._top or 1) if from_zero else _margins(min(ys), max(ys), 0.06)))

    def _grid(self, locator) -> str:
        """Draws axes and grid. Returns the texts of the ticks as SVG."""
        limits = self._axes.get_xlim(), self._axes.get_ylim()
        ticks = [
            [at for at in place.tick_values(*ends) if ends[0] <= at <= ends[1]]
            for place, ends in zip((locator, self._numbers), limits, strict=True)
        ]
        faint = {"colors": INK, "alpha": 0.15, "linewidth": 0.6}
        self._axes.vlines(ticks[0], *limits[1], **faint)
        self._axes.hlines(ticks[1], *limits[0], **faint)
        (low, high), (bottom, top) = limits
        self._axes.plot([low, low, high], [top, bottom, bottom], color=INK, linewidth=0.8)
        width, height = 72 * WIDTH - LEFT - RIGHT, 72 * HEIGHT - TOP - BOTTOM
        xs = [(LEFT + width * (at - low) / (high - low), 72 * HEIGHT - 7, at) for at in ticks[0]]
        ys = [(LEFT - 4, TOP + height * (top - at) / (top - bottom) + 3, at) for at in ticks[1]]
        texts = [TICK.format(x=x, y=y, anchor=anchor, text=_tick(at))
                 for anchor, places in (("middle", xs), ("end", ys)) for x, y, at in places]  # fmt: skip
        return "".join(texts)


def _tick(value: float) -> str:
    """Returns the text of a tick: 6e-5 instead of 6e-05, and 1.8e-4 instead of 0.00018."""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.6g}".replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")


def _margins(low: float, high: float, share: float) -> tuple[float, float]:
    room = share * (high - low) or abs(high) * 0.1 or 0.5
    return low - room, high + room


def _clean(svg: str) -> str:
    """Returns matplotlib's SVG for a page: its font, colours and width, no ids that several drawings share."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]+")[^>]*>', r"<svg \1>", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace("xlink:href", "href")
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(COLOUR.format(r"(\d)"), r"var(--c\1)", svg)
    svg = re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]).replace("\n", ""), svg)
    return re.sub(r"\n\s*", "\n", svg).strip()


def draw_overview(metrics: list[dict]) -> bytes:
    """Returns a PNG of about 1000 x 400 pixels: score and KL, or loss and accuracy, by step; dots are held-out values.

    metrics: rows of metrics.jsonl. What has no number is left out.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    titles = {"score_mean": "score", "kl_ref": "KL to the reference, nats per response", "loss": "loss",
              "accuracy": "accuracy", "token_accuracy": "accuracy of tokens"}  # fmt: skip
    lines = {key: [points(metrics, name) for name in (key, f"eval_{key}")] for key in titles}
    shown = [key for key, both in lines.items() if any(both)][:2]
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4))  # without layout="constrained", which takes twice as long
        room = {"left": 0.07, "right": 0.98, "bottom": 0.12, "top": 0.92}
        panels = figure.subplots(1, max(1, len(shown)), squeeze=False, gridspec_kw=room)[0]
        for axes, key in zip(panels, shown, strict=False):
            for line, style in zip(lines[key], ("-", "o"), strict=True):
                label = "training" if style == "-" else "held out"
                axes.plot(*zip(*thinned(line), strict=True), style, color="#0072B2", label=label) if line else None
            axes.set(title=titles[key], xlabel="step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.2)
            axes.legend(fontsize="small", frameon=False)
        figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
    return buffer.getvalue()
