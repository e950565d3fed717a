"""Evaluate claims: measures of runs, bounds, and intervals over seeds.

A criterion is one number per seed and a bound. It is confirmed if its 95 % interval over seeds (Student's t) lies
beyond the bound, refuted if it lies on the other side, and otherwise undecided. A claim is confirmed if all of its
criteria are, and refuted if one of them is. Start: the first ten steps. End: the last tenth of the run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import isnan

from experiments.curves import BIN, Run
from experiments.intervals import over_seeds

Runs = Mapping[str, list[Run]]  # setting -> its runs, by seed
FAR = 20.0  # KL in nats per response that counts as far from the reference: 1.25 per token at the maximum length


@dataclass(frozen=True)
class Criterion:
    """A measure and its bound. text: description; measure: one number per seed; above or below: the bound."""

    text: str
    measure: Callable[[Runs], list[float]]
    above: float | None = None
    below: float | None = None

    @property
    def bound(self) -> str:
        """The bound as text."""
        return f"> {self.above:g}" if self.above is not None else f"< {self.below:g}"

    def evaluate(self, runs: Runs) -> tuple[str, float, float]:
        """Returns (verdict, mean, half the width of the interval)."""
        mean, half = over_seeds(self.measure(runs))
        sign, bound = (1, self.above) if self.above is not None else (-1, self.below)
        distance = sign * (mean - bound)
        if isnan(half) or abs(distance) <= half:
            return "undecided", mean, half
        return ("confirmed" if distance > 0 else "refuted"), mean, half


@dataclass(frozen=True)
class Claim:
    """A statement, by the paper or beyond it, and its criteria."""

    text: str
    criteria: list[Criterion]

    def evaluate(self, runs: Runs) -> str:
        """Returns confirmed, refuted or undecided."""
        verdicts = [criterion.evaluate(runs)[0] for criterion in self.criteria]
        return next((v for v in ("refuted", "undecided") if v in verdicts), "confirmed")


@dataclass(frozen=True)
class Figure:
    """Claims of one figure. settings: name -> number of runs (seeds 1 to that number).

    parts: setting -> what it lacks, for a table of differences to the setting `whole`. frontiers: estimator -> its
    settings with several KL weights.
    """

    title: str
    settings: dict[str, int]
    claims: list[Claim]
    parts: dict[str, str] = field(default_factory=dict)
    whole: str = ""
    frontiers: dict[str, list[str]] = field(default_factory=dict)


def of(setting: str, measure: Callable[[Run], float]) -> Callable[[Runs], list[float]]:
    """Returns a function that measures each run of a setting."""
    return lambda runs: [measure(run) for run in runs[setting]]


def between(first: str, second: str, measure: Callable[[Run], float]) -> Callable[[Runs], list[float]]:
    """Returns a function for the difference of a measure per seed, over the steps of the shorter run."""

    def difference(a: Run, b: Run) -> float:
        steps = min(a.steps, b.steps)
        return measure(a.until(steps)) - measure(b.until(steps))

    return lambda runs: [difference(a, b) for a, b in zip(runs[first], runs[second], strict=False)]


def frontier(runs: list[Run], start: float) -> list[tuple[float, float]]:
    """Returns (KL, gold) at the end of runs with several KL weights, and (0, start), by KL."""
    return sorted([(0.0, start), *((run.end("kl_ref"), run.end("gold")) for run in runs)])


def gold_at(points: list[tuple[float, float]], kl: float) -> float:
    """Returns gold at a KL, on straight lines between the points; that of the last point beyond it."""
    for (left, low), (right, high) in pairwise(points):
        if left <= kl <= right and left < right:
            return low + (high - low) * (kl - left) / (right - left)
    return points[-1][1]


def frontier_difference(first: list[str], second: list[str], kl: float) -> Callable[[Runs], list[float]]:
    """Returns a function for gold at a KL on the frontier of the first settings minus that of the second, per seed."""

    def measure(runs: Runs) -> list[float]:
        differences = []
        for seed in range(len(runs[first[0]])):
            start = runs[min(first[0], second[0])][seed].start("gold")  # the same policy in all
            ours, theirs = ([runs[setting][seed] for setting in settings] for settings in (first, second))
            differences.append(gold_at(frontier(ours, start), kl) - gold_at(frontier(theirs, start), kl))
        return differences

    return measure


def at_equal_seconds(first: str, second: str, metric: str, cost: float, alone: int) -> Callable[[Runs], list[float]]:
    """Returns a function for a metric of the first, when it has used the seconds of the whole second run, minus its.

    cost: seconds of a step of the first, in steps of the second. alone: the first one's steps of critic pre-training.
    """

    def difference(a: Run, b: Run) -> float:
        return a.until(max(BIN, int(b.steps / cost) - alone)).end(metric) - b.end(metric)

    return lambda runs: [difference(a, b) for a, b in zip(runs[first], runs[second], strict=False)]


def end(metric: str) -> Callable[[Run], float]:
    """Returns a measure: the mean over the last tenth."""
    return lambda run: run.end(metric)


def end_size(metric: str) -> Callable[[Run], float]:
    """Returns a measure: the absolute value of `end`."""
    return lambda run: abs(run.end(metric))


def change(metric: str) -> Callable[[Run], float]:
    """Returns a measure: the mean over the last tenth minus that over the first ten steps."""
    return lambda run: run.change(metric)


def collapses(setting: str) -> list[Criterion]:
    """Returns the criteria of a collapse: far from the reference, and worse than at the start."""
    return [
        Criterion(f"{setting}: KL at the end, nats per response", of(setting, end("kl_ref")), above=FAR),
        Criterion(f"{setting}: gold, end - start", of(setting, change("gold")), below=0.0),
    ]


def stable(setting: str) -> list[Criterion]:
    """Returns the criteria of stability: near the reference, and not worse than at the start."""
    return [
        Criterion(f"{setting}: KL at the end, nats per response", of(setting, end("kl_ref")), below=FAR),
        Criterion(f"{setting}: gold, end - start", of(setting, change("gold")), above=-0.05),
    ]


def gained(run: Run) -> float:
    """Returns the change of the proxy score in standard deviations of the first responses."""
    return run.change("score_mean") / run.start("score_std")


def tax(run: Run) -> float:
    """Returns the increase of the NLL of held-out replies."""
    return run.tax


def below_own_best(run: Run) -> float:
    """Returns the gold score of the best fifty steps minus that at the end."""
    return max(run.smooth("gold", 5)) - run.end("gold")


def early_value_loss(run: Run) -> float:
    """Returns the highest value loss of ten steps within the first hundred."""
    return max(run.curves["value_loss"][:10])
