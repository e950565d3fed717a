"""How a claim is judged: measures of runs, bounds, intervals over seeds.

A criterion is a number a seed and a bound. Its 95 % interval over seeds (Student's t) decides: all of it beyond the
bound confirms, all of it on the other side refutes, anything else is undecided. A claim is confirmed when all of its
criteria are, refuted when one of them is. Start: the first ten steps. End: the last tenth of the run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isnan

from experiments.curves import Run
from experiments.intervals import over_seeds

Runs = Mapping[str, list[Run]]  # setting -> its runs, by seed
FAR = 20.0  # nats a response that count as far from the reference: 1.25 a token at the cap


@dataclass(frozen=True)
class Criterion:
    """text: what is measured, in words; measure: a number a seed; above, below: one of them is the bound."""

    text: str
    measure: Callable[[Runs], list[float]]
    above: float | None = None
    below: float | None = None

    @property
    def bound(self) -> str:
        """In words."""
        return f"> {self.above:g}" if self.above is not None else f"< {self.below:g}"

    def judge(self, runs: Runs) -> tuple[str, float, float]:
        """(verdict, mean, half the width of its interval)."""
        mean, half = over_seeds(self.measure(runs))
        sign, bound = (1, self.above) if self.above is not None else (-1, self.below)
        distance = sign * (mean - bound)
        if isnan(half) or abs(distance) <= half:
            return "undecided", mean, half
        return ("confirmed" if distance > 0 else "refuted"), mean, half


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, or one beyond it, and what has to hold for it."""

    text: str
    criteria: list[Criterion]

    def judge(self, runs: Runs) -> str:
        """confirmed, refuted or undecided."""
        verdicts = [criterion.judge(runs)[0] for criterion in self.criteria]
        return next((v for v in ("refuted", "undecided") if v in verdicts), "confirmed")


@dataclass(frozen=True)
class Figure:
    """settings: name -> runs needed (seeds 1 to that); claims: about them."""

    title: str
    settings: dict[str, int]
    claims: list[Claim]


def of(setting: str, measure: Callable[[Run], float]) -> Callable[[Runs], list[float]]:
    """A measure of each run of a setting."""
    return lambda runs: [measure(run) for run in runs[setting]]


def between(first: str, second: str, measure: Callable[[Run], float]) -> Callable[[Runs], list[float]]:
    """The measure of `first` minus that of `second`, seed by seed, over as many steps as the shorter one has."""

    def differences(runs: Runs) -> list[float]:
        return [_difference(a, b, measure) for a, b in zip(runs[first], runs[second], strict=False)]

    return differences


def _difference(first: Run, second: Run, measure: Callable[[Run], float]) -> float:
    steps = min(first.steps, second.steps)
    return measure(first.until(steps)) - measure(second.until(steps))


def end(metric: str) -> Callable[[Run], float]:
    """Its mean over the last tenth."""
    return lambda run: run.end(metric)


def end_size(metric: str) -> Callable[[Run], float]:
    """The same without its sign."""
    return lambda run: abs(run.end(metric))


def change(metric: str) -> Callable[[Run], float]:
    """From the first ten steps to the last tenth."""
    return lambda run: run.change(metric)


def collapses(setting: str) -> list[Criterion]:
    """Far from the reference, and worse than at the start."""
    return [
        Criterion(f"{setting}: KL at the end, nats a response", of(setting, end("kl_ref")), above=FAR),
        Criterion(f"{setting}: gold, end - start", of(setting, change("gold")), below=0.0),
    ]


def holds(setting: str) -> list[Criterion]:
    """Near the reference, and no worse than at the start."""
    return [
        Criterion(f"{setting}: KL at the end, nats a response", of(setting, end("kl_ref")), below=FAR),
        Criterion(f"{setting}: gold, end - start", of(setting, change("gold")), above=-0.05),
    ]


def gained(run: Run) -> float:
    """Proxy score, end - start, in deviations of the start's responses."""
    return run.change("score_mean") / run.start("score_std")


def tax(run: Run) -> float:
    """What held-out replies have lost."""
    return run.tax


def below_own_best(run: Run) -> float:
    """How far gold is at the end below its best fifty steps."""
    return max(run.smooth("gold", 5)) - run.end("gold")


def early_value_loss(run: Run) -> float:
    """The most that any ten of the first hundred steps had."""
    return max(run.curves["value_loss"][:10])
