"""Where a proxy score and held-out scores of a run's policies part, against their KL (Gao et al. 2023). Pure.

The functions take and return values per policy and resample, [policies, resamples]: the first resample is the sample
itself, the others are drawn from the prompts, the same for all policies. The first policy is the one before training.
"""

from statistics import NormalDist

import torch

RESAMPLES = 2000
Interval = list[float]  # estimate, and the limits of its 95 % interval


def resampled_mean(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns the mean over prompts in each resample. x: [policies, prompts]."""
    count = x.shape[1]
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(RESAMPLES + 1, count, dtype=torch.float64)
    weights[0] = 1.0
    weights[1:].scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return x.double() @ weights.T / count


def interval(x: torch.Tensor) -> Interval:
    """Returns the estimate and the percentile bootstrap interval of one value: [resamples]. Infinity is a value."""
    limits = torch.tensor([0.025, 0.975], dtype=x.dtype)
    return [float(x[0]), *torch.nanquantile(x[1:], limits, interpolation="nearest").tolist()]


def simultaneous(x: torch.Tensor, count: int) -> Interval:
    """Returns the estimate of one of `count` values, all of whose intervals hold together with 95 % (Bonferroni).

    Normal, with the bootstrap's deviation: the resamples are too few for quantiles that far out.
    """
    half = NormalDist().inv_cdf(1 - 0.025 / count) * float(x[1:].std())
    return [float(x[0]), float(x[0]) - half, float(x[0]) + half]


def standardised(scores: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns mean gains over the first policy, in standard deviations of its scores. scores: [policies, prompts]."""
    means, deviation = resampled_mean(scores, seed), scores[0].double().std(correction=1)
    return (means - means[0]) / (deviation if deviation > 0 else 1.0)


def distance(kl: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns d = sqrt(KL), 0 for estimates below 0. kl: [policies, prompts]."""
    return resampled_mean(kl, seed).clamp(min=0).sqrt()


def fit(d: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (alpha, beta) of R(d) = d (alpha - beta log d), by least squares over policies (Gao et al. 2023, eq. 2).

    Both [resamples]; NaN with fewer than two distances above 0.
    """
    logs = torch.xlogy(d, d)  # d log d, 0 at 0
    a, b, c = d.square().sum(0), -(d * logs).sum(0), logs.square().sum(0)
    x, y = (d * gain).sum(0), -(logs * gain).sum(0)
    determinant = a * c - b * b
    determinant = torch.where(determinant > 1e-12 * a * c, determinant, torch.nan)
    return (c * x - b * y) / determinant, (a * y - b * x) / determinant


def peak(alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Returns the distance at which R(d) is largest, exp(alpha / beta - 1); infinity unless beta > 0."""
    return torch.where(beta > 0, (alpha / beta - 1).exp(), torch.inf)


def parting(proxy: torch.Tensor, heldout: torch.Tensor, order: list[int]) -> dict | None:
    """Returns the first policy whose proxy score is higher and held-out score lower than earlier, or None.

    order: indices of policies by step. Compared with the policy before it that has the highest held-out score; both
    intervals of the differences must exclude 0. The highest of noisy scores is too high, and each policy is compared:
    the intervals hold for all pairs together. Keys: policy, since (indices), proxy, heldout (differences).
    """
    pairs = len(order) * (len(order) - 1) // 2
    for place, i in enumerate(order[1:], 1):
        since = max(order[:place], key=lambda k: float(heldout[k, 0]))
        rise, fall = (simultaneous(x[i] - x[since], pairs) for x in (proxy, heldout))
        if rise[1] > 0 > fall[2]:
            return {"policy": i, "since": since, "proxy": rise, "heldout": fall}
    return None


def to_take(heldout: torch.Tensor, d: torch.Tensor) -> tuple[int, int]:
    """Returns (index of the policy to take, of that with the highest held-out score).

    Taken: the smallest KL among those whose score is not measurably lower, where the 95 % interval includes 0.
    """
    best = int(heldout[:, 0].argmax())
    near = [i for i in range(len(heldout)) if interval(heldout[i] - heldout[best])[2] >= 0]
    return min(near, key=lambda i: float(d[i, 0])), best
