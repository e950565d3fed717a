"""Metrics of reward models on compared answers, used in training, evaluation and reports. Pure.

Each prompt counts once: each of its pairs has weight 1 / number of its pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from reward.batches import Comparison, PairIndex, pair_index, row_ranges
from reward.loss import ranking_hits, ranking_losses
from reward.win_rate import wilson_interval

LARGER_IS_BETTER = {
    "accuracy": True, "worst_subset_accuracy": True, "loss": False, "score_difference": True,
    "calibration_error": False, "length_bias": False,
}  # fmt: skip
BINS = 10  # bins of predicted preference from 1/2 to 1


@dataclass(frozen=True)
class ScoredItems:
    """Comparisons and the scores of their answers. scores: float32 [answers], on the CPU."""

    items: list[Comparison]
    scores: torch.Tensor

    def __post_init__(self) -> None:
        assert len(self.scores) == sum(len(item.answers) for item in self.items)

    @property
    def index(self) -> PairIndex:
        """Rows of `scores` that are compared."""
        return pair_index(self.items)

    @property
    def differences(self) -> torch.Tensor:
        """Score of the better answer minus score of the worse: [pairs]."""
        index = self.index
        return self.scores[index.better] - self.scores[index.worse]

    @property
    def lengths(self) -> torch.Tensor:
        """Number of tokens per answer: float32 [answers]."""
        return torch.tensor([length for item in self.items for length in item.answer_lengths], dtype=torch.float32)

    def where(self, keep: Callable[[Comparison], bool]) -> "ScoredItems":
        """Returns the comparisons for which `keep` is true."""
        rows = torch.tensor([keep(item) for item in self.items for _ in item.answers], dtype=torch.bool)
        return ScoredItems([item for item in self.items if keep(item)], self.scores[rows])

    def of(self, subset: str) -> "ScoredItems":
        """Returns the comparisons of one subset."""
        return self.where(lambda item: item.subset == subset)

    @property
    def subsets(self) -> list[str]:
        """Names of the subsets, sorted."""
        return sorted({item.subset for item in self.items})


@dataclass(frozen=True)
class Bin:
    """Pairs with a predicted preference in [low, high]: total weight, mean prediction, observed accuracy."""

    low: float
    high: float
    count: float
    predicted: float
    observed: float


def weighted_mean(x: torch.Tensor, weights: torch.Tensor) -> float:
    """Returns sum(x * weights) / sum(weights)."""
    return float((x * weights).sum() / weights.sum())


def accuracy(scored: ScoredItems) -> float:
    """Returns the share of pairs whose better answer has the higher score; a tie counts half."""
    index = scored.index
    return weighted_mean(ranking_hits(scored.scores[index.better], scored.scores[index.worse]), index.weights)


def accuracy_interval(scored: ScoredItems) -> tuple[float, float]:
    """Returns the 95 % Wilson interval of `accuracy`, with the pairs of a prompt as one trial."""
    count = len(scored.items)
    return wilson_interval(accuracy(scored) * count, count)[1:]


def calibration(scored: ScoredItems, num_bins: int = BINS) -> list[Bin]:
    """Returns predicted (sigmoid(|d|)) and observed preference in equal bins of the prediction, without empty bins."""
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
    """Returns the expected calibration error: the mean of |observed - predicted| over bins, weighted by count."""
    return sum(b.count * abs(b.observed - b.predicted) for b in bins) / sum(b.count for b in bins)


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns Pearson's correlation coefficient, or 0 if x or y is constant."""
    return float(torch.corrcoef(torch.stack([x, y]).double())[0, 1].nan_to_num())


def mean_best_score(scored: ScoredItems) -> float:
    """Returns the mean score of the best answers."""
    rows = row_ranges(len(item.answers) for item in scored.items)
    return float(scored.scores[[places[item.best] for item, places in zip(scored.items, rows, strict=True)]].mean())


def length_preference(scored: ScoredItems) -> tuple[float, float]:
    """Returns (share of pairs whose longer answer is labelled better, whose longer answer has the higher score)."""
    index, lengths, scores = scored.index, scored.lengths, scored.scores
    better, worse = lengths[index.better], lengths[index.worse]
    longer_better = ranking_hits(better, worse)
    preferred = ranking_hits(scores[index.better], scores[index.worse])
    longer_preferred = torch.where(better == worse, 0.5, torch.where(better > worse, preferred, 1 - preferred))
    return weighted_mean(longer_better, index.weights), weighted_mean(longer_preferred, index.weights)


def evaluation_metrics(scored: ScoredItems) -> dict[str, float]:
    """Returns the metrics of LARGER_IS_BETTER, the length correlation, and with several subsets their accuracies.

    loss: -logsigmoid(d), without margin and smoothing. length_bias: absolute correlation of score and length.
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


def agreement(models: list[ScoredItems]) -> dict[str, float]:
    """Returns the agreement of several models on the same comparisons.

    pairwise: share of pairs on which two models prefer the same answer, averaged over pairs of models. unanimous: share
    on which all agree. strength_std: mean population standard deviation over models (Part II §2).
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
