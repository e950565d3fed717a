"""Statistics of pairwise verdicts: win rates, length control, position bias, Bradley-Terry ratings. numpy only, no I/O.

Intervals are 95 % of a bootstrap over prompts, whose draws are rows of `weights`, or Wilson's for shares of counts.
"""

import numpy

from reward.win_rate import OUTCOMES, count_outcomes, wilson_interval

RESAMPLES = 2000
RIDGE = 0.01  # keeps coefficients finite where all verdicts agree
ELO = 400 / numpy.log(10)  # a rating that is 400 higher wins ten times as often as it loses
Interval = list[float] | None  # [estimate, low, high]; None: unknown


def resampled(count: int, seed: int) -> numpy.ndarray:
    """Returns [1 + RESAMPLES, count] weights: ones for the estimate, then how often each prompt was drawn."""
    drawn = numpy.random.default_rng(seed).multinomial(count, numpy.full(count, 1 / count), size=RESAMPLES)
    return numpy.concatenate([numpy.ones((1, count)), drawn])


def interval(estimates: numpy.ndarray) -> Interval:
    """Returns [estimate, low, high] of a quantity under each row of weights; None if the estimate is NaN."""
    if numpy.isnan(estimates[0]):
        return None
    return [float(estimates[0]), *map(float, numpy.nanpercentile(estimates[1:], [2.5, 97.5]))]


def mean(values: numpy.ndarray, weights: numpy.ndarray) -> numpy.ndarray:
    """Returns the mean of the known values ([count], or [count, n] with n per prompt) under each row of weights."""
    values = values.reshape(len(values), -1)
    known = (~numpy.isnan(values)).sum(1)
    with numpy.errstate(invalid="ignore"):  # NaN where none is known
        return weights @ numpy.nansum(values, 1) / (weights @ known)


def outcomes(verdicts: numpy.ndarray, same: numpy.ndarray) -> numpy.ndarray:
    """Returns the score of the second policy per prompt, the mean of both orders; NaN unless both are known.

    verdicts: [count, 2], 1, 0.5 or 0 for the answer shown first, which is the first policy's, then the second's. same:
    whether the answers are the same text, about which nobody was asked: a tie.
    """
    return numpy.where(same, 0.5, (1 - verdicts[:, 0] + verdicts[:, 1]) / 2)


def length_controlled(outcome: numpy.ndarray, difference: numpy.ndarray, weights: numpy.ndarray) -> numpy.ndarray:
    """Returns the win rate at equal lengths under each row of weights (AlpacaEval 2: Dubois et al. 2024).

    It is sigmoid(a) of the logistic regression P(win) = sigmoid(a + b tanh(d / std(d))), d the difference of lengths,
    without that paper's term for the difficulty of prompts. Newton's method; the penalty is RIDGE / 2 (a² + b²). NaN
    without an outcome, or if all differences are the same and not 0, from which a and b cannot be told apart.
    """
    known = ~numpy.isnan(outcome)
    outcome, difference, weights = outcome[known], difference[known], weights[:, known]
    spread = difference.std() if len(difference) else 0.0
    if not spread and difference.any():
        return numpy.full(len(weights), numpy.nan)
    features = numpy.stack([numpy.ones(len(outcome)), numpy.tanh(difference / spread) if spread else 0 * outcome])
    found = numpy.zeros((len(weights), 2))
    for _ in range(50):
        chance = 1 / (1 + numpy.exp(-found @ features))
        slope = (weights * (outcome - chance)) @ features.T - RIDGE * found
        products = features[:, None] * features  # [2, 2, count]
        curve = numpy.einsum("rn,ijn->rij", weights * chance * (1 - chance), products) + RIDGE * numpy.eye(2)
        step = numpy.linalg.solve(curve, slope[..., None])[..., 0]
        step /= numpy.maximum(1, numpy.abs(step).max(1, keepdims=True))  # a whole step may overshoot
        found += step
        if numpy.abs(step).max() < 1e-9:
            break
    return numpy.where(weights.sum(1) > 0, 1 / (1 + numpy.exp(-found[:, 0])), numpy.nan)


def judged_pair(verdicts, same, lengths, scores: dict[str, list], weights) -> dict:
    """Returns what a judge found about two policies, from the view of the second.

    verdicts, same: as in `outcomes`. lengths: those of second answers minus first ones, in characters. scores: name ->
    score of second answers minus first ones, NaN where one is unknown.
    """
    outcome = outcomes(verdicts, same)
    known = outcome[~numpy.isnan(outcome)]
    counts = count_outcomes((known - 0.5).tolist(), 0.0)
    result: dict = {"prompts": len(known), "counts": counts, "same_answers": int(same.sum())}
    if not len(known):
        return result
    result |= {name: list(wilson_interval(counts[name], len(known))) for name in OUTCOMES}
    both = ~numpy.isnan(verdicts).any(1)
    agree = numpy.where(both, verdicts.sum(1) == 1, numpy.nan)
    result["win_rate"] = interval(mean(outcome, weights))
    result["length_controlled_win_rate"] = interval(length_controlled(outcome, lengths, weights))
    result["first_place"] = interval(mean(numpy.where(both, verdicts.mean(1), numpy.nan), weights))
    result["orders_agree"] = interval(mean(agree, weights))
    result["agreement"] = {}
    for name, score in scores.items():
        signs = numpy.sign(outcome - 0.5) * numpy.sign(numpy.asarray(score, dtype=float))
        decided, equal = int((numpy.abs(signs) == 1).sum()), int((signs == 1).sum())
        share = list(wilson_interval(equal, decided)) if decided else None
        result["agreement"][name] = {"prompts": decided, "share": share}
    return result


def bradley_terry(scores: numpy.ndarray, weights: numpy.ndarray) -> list[Interval]:
    """Returns the Bradley-Terry rating of each of n policies, with mean 0, on Elo's scale.

    scores: [count, n, n], that of policy i against j: 1, 0.5 (a tie is half a win) or 0; NaN where unknown. Each pair
    counts as if it had tied once more, so that ratings are finite. A policy without a score has none. Solved by the MM
    algorithm (Hunter 2004).
    """
    others = 1 - numpy.eye(scores.shape[1])
    is_known = (~numpy.isnan(scores) & (others > 0)).any((0, 2))
    wins = (numpy.tensordot(weights, numpy.nan_to_num(scores), 1) + 0.5) * others
    games, strength = wins + wins.transpose(0, 2, 1), numpy.ones(wins.shape[:2])
    for _ in range(10_000):
        sums = strength[:, :, None] + strength[:, None]
        new = wins.sum(2) / (games / sums).sum(2)
        new /= numpy.exp(numpy.log(new).mean(1, keepdims=True))
        change, strength = numpy.abs(numpy.log(new / strength)).max(), new
        if change < 1e-7:
            break
    return [interval(x) if known else None for x, known in zip(ELO * numpy.log(strength).T, is_known, strict=True)]


def pair_scores(columns: list[list[float | None]]) -> numpy.ndarray:
    """Returns [count, n, n] for `bradley_terry`, from a number per policy and prompt: the higher one wins."""
    values = numpy.array(columns, dtype=float).T
    difference = values[:, :, None] - values[:, None]
    return (numpy.sign(difference) + 1) / 2
