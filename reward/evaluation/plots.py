"""PNG plots of evaluations and preference strengths. matplotlib is imported by `check_plots` and needs no display."""

import importlib.util

from reward.metrics import Bin, ScoredItems, calibration
from utils.errors import UserError
from utils.terminal import printable

BINS = 50


def check_plots() -> None:
    """Raises UserError if matplotlib is missing; called before the scoring, which takes long. Labels are plain text."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--output: plots need matplotlib; run pip install -r requirements.txt")
    import matplotlib

    matplotlib.rcParams["text.parse_math"] = False  # a path may contain "$"


def _figure(columns: int = 1):
    """Returns (figure, axes) with `columns` panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * columns, 4.4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_differences(scored: dict[str, ScoredItems], file: str) -> None:
    """Plots the distribution of score differences, better minus worse answer, per model (Part II, Figure 2)."""
    figure, (axes,) = _figure()
    for name, model in scored.items():
        axes.hist(model.differences.numpy(), bins=BINS, histtype="step", density=True, label=printable(name))
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set(xlabel="score of the better answer − score of the worse", ylabel="density")
    axes.legend(fontsize="small")
    figure.savefig(file)


def draw_calibration(scored: dict[str, ScoredItems], file: str) -> None:
    """Plots observed against predicted preference per bin; a calibrated model lies on the diagonal."""
    figure, (axes,) = _figure()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
    for name, model in scored.items():
        bins: list[Bin] = calibration(model)
        axes.plot([b.predicted for b in bins], [b.observed for b in bins], marker="o", label=printable(name))
    axes.set(xlabel="predicted preference", ylabel="observed preference", xlim=(0.49, 1.01), ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
    figure.savefig(file)


def draw_lengths(scored: dict[str, ScoredItems], file: str) -> None:
    """Plots score against length of all answers, one panel per model."""
    figure, panels = _figure(len(scored))
    for axes, (name, model) in zip(panels, scored.items(), strict=True):
        axes.scatter(model.lengths.numpy(), model.scores.numpy(), s=4, alpha=0.4)
        axes.set(title=printable(name), xlabel="answer length, tokens", ylabel="score")
        axes.title.set_fontsize("small")
    figure.savefig(file)


def draw_strengths(means: list[float], deviations: list[float], file: str) -> None:
    """Plots mean preference strengths as a histogram and against their deviations (Part II, Figures 2 and 3)."""
    figure, (left, right) = _figure(2)
    left.hist(means, bins=BINS)
    left.axvline(0.0, color="grey", linewidth=0.8)
    left.set(xlabel="mean preference difference", ylabel="pairs")
    right.scatter(means, deviations, s=4, alpha=0.4)
    right.set(xlabel="mean preference difference", ylabel="standard deviation over the models")
    figure.savefig(file)
