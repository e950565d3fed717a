"""What scores of compared answers say about a reward model: one set of numbers for training, evaluation and reports.

Every prompt counts once: of its pairs, each 1 / number of them. Pure.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from reward.batches import Comparison, PairIndex, pair_index, ranges_of
from reward.loss import ranking_hits, ranking_losses
from reward.win_rate import share_interval

LARGER_IS_BETTER = {
    "accuracy": True,
    "worst_subset_accuracy": True,
    "loss": False,
    "score_difference": True,
    "calibration_error": False,
    "length_bias": False,
}
BINS = 10  # of predicted preferences from 1/2 to 1


@dataclass(frozen=True)
class Scored:
    """Comparisons and what a model says of their answers. scores: float32 [answers], on the CPU."""

    items: list[Comparison]
    scores: torch.Tensor

    def __post_init__(self) -> None:
        assert len(self.scores) == sum(len(item.answers) for item in self.items)

    @property
    def index(self) -> PairIndex:
        """Which rows of `scores` are compared."""
        return pair_index(self.items)

    @property
    def differences(self) -> torch.Tensor:
        """Score of the better answer minus that of the worse. [pairs]"""
        index = self.index
        return self.scores[index.better] - self.scores[index.worse]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of every answer. float32 [answers]"""
        return torch.tensor([length for item in self.items for length in item.answer_lengths], dtype=torch.float32)

    def where(self, keep: Callable[[Comparison], bool]) -> "Scored":
        """The comparisons for which `keep` holds."""
        rows = torch.tensor([keep(item) for item in self.items for _ in item.answers], dtype=torch.bool)
        return Scored([item for item in self.items if keep(item)], self.scores[rows])

    def of(self, subset: str) -> "Scored":
        """The comparisons of one subset."""
        return self.where(lambda item: item.subset == subset)

    @property
    def subsets(self) -> list[str]:
        """Names, in order."""
        return sorted({item.subset for item in self.items})


@dataclass(frozen=True)
class Bin:
    """Pairs whose predicted preference lies in [low, high]: how many prompts' worth, mean prediction, share right."""

    low: float
    high: float
    count: float
    predicted: float
    observed: float


def weighted_mean(x: torch.Tensor, weights: torch.Tensor) -> float:
    """Sum of x by weights over the sum of the weights."""
    return float((x * weights).sum() / weights.sum())


def accuracy(scored: Scored) -> float:
    """Share of pairs whose better answer has the higher score; a tie counts half."""
    index = scored.index
    return weighted_mean(ranking_hits(scored.scores[index.better], scored.scores[index.worse]), index.weights)


def accuracy_interval(scored: Scored) -> tuple[float, float]:
    """Its 95 % interval (Wilson), in which the pairs of one prompt are one trial."""
    count = len(scored.items)
    return share_interval(accuracy(scored) * count, count)[1:]


def calibration(scored: Scored, num_bins: int = BINS) -> list[Bin]:
    """Predicted against observed preference, in equal bins of max(s(d), s(-d)) from 1/2 to 1; empty ones are left out.

    The prediction is for the answer that the model prefers; observed is how often the label says the same.
    """
    index, differences = scored.index, scored.differences
    predicted = torch.sigmoid(differences.abs())
    hits = ranking_hits(scored.scores[index.better], scored.scores[index.worse])
    places = ((predicted - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    bins = []
    for place in places.unique().tolist():
        inside, width = places == place, 0.5 / num_bins
        weights = index.weights[inside]
        numbers = (weighted_mean(predicted[inside], weights), weighted_mean(hits[inside], weights))
        bins.append(Bin(0.5 + place * width, 0.5 + (place + 1) * width, float(weights.sum()), *numbers))
    return bins


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: |observed - predicted|, averaged over bins by their counts."""
    return sum(b.count * abs(b.observed - b.predicted) for b in bins) / sum(b.count for b in bins)


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson's correlation; 0 where one of them does not vary."""
    x, y = (z.double() - z.double().mean() for z in (x, y))
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else 0.0


def mean_best(scored: Scored) -> float:
    """Mean score of each comparison's best answer."""
    rows = ranges_of(len(item.answers) for item in scored.items)
    return float(scored.scores[[places[item.best] for item, places in zip(scored.items, rows, strict=True)]].mean())


def length_preference(scored: Scored) -> tuple[float, float]:
    """(how often the longer answer is labelled better, how often the model prefers it); ties count half."""
    index, lengths, scores = scored.index, scored.lengths, scored.scores
    better, worse = lengths[index.better], lengths[index.worse]
    longer_better = ranking_hits(better, worse)
    preferred = ranking_hits(scores[index.better], scores[index.worse])
    # For equal lengths there is no longer one: whatever the model prefers counts half.
    longer_preferred = torch.where(better == worse, 0.5, torch.where(better > worse, preferred, 1 - preferred))
    return weighted_mean(longer_better, index.weights), weighted_mean(longer_preferred, index.weights)


def held_out_metrics(scored: Scored) -> dict[str, float]:
    """The numbers of an evaluation: those of LARGER_IS_BETTER, and with several subsets an accuracy each.

    loss: -log s(d), without margin and smoothing, so that runs compare; length_bias: the size of the correlation of
    score with length over all answers.
    """
    index = scored.index
    better, worse = scored.scores[index.better], scored.scores[index.worse]
    length_correlation = correlation(scored.scores, scored.lengths)
    by_subset = {f"accuracy_{name}": accuracy(scored.of(name)) for name in scored.subsets}
    return {
        "loss": weighted_mean(ranking_losses(better, worse), index.weights),
        "accuracy": accuracy(scored),
        "score_difference": weighted_mean(better - worse, index.weights),
        "calibration_error": calibration_error(calibration(scored)),
        "length_correlation": length_correlation,
        "length_bias": abs(length_correlation),
        "worst_subset_accuracy": min(by_subset.values()),
        **(by_subset if len(by_subset) > 1 else {}),
    }


def agreement(models: list[Scored]) -> dict[str, float]:
    """How far models of the same comparisons say the same.

    pairwise: mean over pairs of models of the share of pairs on which both prefer the same answer (a tie against a
    preference is half); unanimous: share on which all do; strength_std: mean over pairs of the standard deviation of
    the score difference over models (population, as in Part II §2); accuracy: of the mean difference.
    """
    weights = models[0].index.weights
    differences = torch.stack([scored.differences for scored in models])  # [models, pairs]
    hits = 0.5 * (torch.sign(differences) + 1)
    same = [1 - (hits[a] - hits[b]).abs() for a in range(len(models)) for b in range(a + 1, len(models))]
    mean_difference = differences.mean(0)
    return {
        "pairwise": weighted_mean(torch.stack(same).mean(0), weights),
        "unanimous": weighted_mean((hits == hits[0]).all(0).float(), weights),
        "strength_std": weighted_mean(differences.std(0, correction=0), weights),
        "accuracy": weighted_mean(0.5 * (torch.sign(mean_difference) + 1), weights),
    }
