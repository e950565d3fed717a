"""Picture of `ppo.overoptimisation`: proxy and held-out score against sqrt(KL). matplotlib needs no display."""

import io
import math

from utils.terminal import printable


def draw_overoptimisation(report: dict) -> bytes:
    """Returns a PNG of the report: points with 95 % intervals, fitted curves, where they part and what to take."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes, policies = figure.subplots(), report["policies"]
    place = {one["name"]: one["sqrt_kl"][0] for one in policies}
    judges = {"proxy": ("proxy", "tab:blue"), "held out": ("held out", "tab:orange")}
    for judge, (label, colour) in judges.items():
        values = [one["gains"]["proxy"] if judge == "proxy" else one["held out"] for one in policies]
        spread = [[v - low for v, low, _ in values], [high - v for v, _, high in values]]
        axes.errorbar(
            place.values(), [v[0] for v in values], spread, fmt="o", ms=4, capsize=2, color=colour, label=label
        )
        if judge in report["fit"] and math.isfinite(report["fit"][judge]["alpha"][0]):
            alpha, beta = (report["fit"][judge][name][0] for name in ("alpha", "beta"))
            grid = [max(place.values()) * i / 200 for i in range(1, 201)]
            axes.plot(grid, [d * (alpha - beta * math.log(d)) for d in grid], color=colour, linewidth=0.9)
    for name, text, style in (("take", "take", ":"), ("parting", "they part", "--")):
        if found := report[name]["policy"] if name == "parting" and report[name] else report[name]:
            label = printable(f"{text}: {found}")
            axes.axvline(place[found], color="grey", linewidth=0.9, linestyle=style, label=label)
    axes.axhline(0.0, color="grey", linewidth=0.6)
    axes.set(xlabel="sqrt(KL to the first policy)", ylabel="gain over it, standard deviations")
    axes.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()
