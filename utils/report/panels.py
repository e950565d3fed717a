"""The panels of a report: which metrics are drawn together, and what to look for. Keys: docs/metrics.md."""

import re
from dataclasses import dataclass

from utils.report.choose import is_number


@dataclass(frozen=True)
class Panel:
    """A chart over steps. keys: metric -> label; a metric's held-out values, `eval_…`, are drawn with it."""

    title: str
    keys: dict[str, str]
    hint: str = ""


@dataclass(frozen=True)
class Stack(Panel):
    """A panel whose metrics add up: areas on each other."""


@dataclass(frozen=True)
class Plane(Panel):
    """The second of two metrics over the first, instead of over steps."""


def _one(title: str, key: str, hint: str = "") -> Panel:
    return Panel(title, {key: ""}, hint)


PANELS = [
    _one("Loss", "loss", "If the held-out loss rises while the other falls, the model learns by heart."),
    _one("Accuracy", "accuracy", "Pairs that are ranked as labelled; 0.5 is chance."),
    _one("Score difference", "score_difference", "Better minus worse answer."),
    _one("Accuracy of tokens", "token_accuracy"),
    _one("Calibration error", "calibration_error"),
    _one("Correlation of score and length", "length_correlation", "Far from 0: the model rewards length."),
    _one("Score", "score_mean", "Rises once the policy learns; it rises in a collapse, too: read the samples."),
    _one("KL to the reference, nats per response", "kl_ref", "How far the policy has moved from where it began."),
    Plane(
        "Score against KL", {"kl_ref": "KL", "score_mean": "score"}, "What the score costs in KL, from left to right."
    ),
    _one("Response length, tokens", "response_length", "A sudden jump or fall is a sign of a collapse."),
    _one("Share of responses that end by themselves", "eos_fraction", "The others were cut off."),
    Panel(
        "Perplexity",
        {"perplexity": "policy", "perplexity_ref": "reference"},
        "Of sampled answers, near 1: the policy repeats itself.",
    ),
    _one("Entropy, nats per token", "entropy", "Near 0: the policy hardly varies its answers any more."),
    _one("Value loss", "value_loss", "Does not show a collapse."),
    _one("Explained variance of the critic", "explained_variance", "1: perfect; below 0: worse than a constant."),
    Panel(
        "Clip fraction",
        {"clip_fraction": "policy", "value_clip_fraction": "values"},
        "Tokens that clipping leaves out.",
    ),
    Panel(
        "Gradient norm",
        {"grad_norm_policy": "policy", "grad_norm_critic": "critic", "grad_norm": ""},
        "Before clipping.",
    ),
    Panel("Learning rate", {"lr_policy": "policy", "lr_critic": "critic", "lr": ""}),
    _one("Tokens per second", "tokens_per_second"),
    _one("Memory, GB", "memory_peak_gb", "The most that rank 0 has held so far."),
]
SECONDS = re.compile(r"seconds_[a-z_]{1,20}")


def panels_of(runs_metrics: list[list[dict]]) -> list[Panel]:
    """Returns the panels for which at least one run has a number. Phases are stacked if there is one run."""
    rows, found = [row for metrics in runs_metrics for row in metrics], []
    keys = {key for row in rows for key in row}
    names = {key for key in keys if any(is_number(row.get(key)) for row in rows)}
    for panel in PANELS:
        is_plane = isinstance(panel, Plane)
        known = {key: label for key, label in panel.keys.items() if {key, f"eval_{key}"} & names}
        if len(known) == len(panel.keys) if is_plane else known:
            found.append(type(panel)(panel.title, known, panel.hint))
    phases = {x: x.partition("_")[2] for x in sorted(names) if SECONDS.fullmatch(x)}
    kind = Stack if len(runs_metrics) == 1 else Panel
    return found + ([kind("Seconds per step", phases)] if phases else [])
