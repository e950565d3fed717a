"""Win, tie and loss rates of paired scores, with confidence intervals. Pure."""

from statistics import NormalDist

OUTCOMES = ("win", "tie", "lose")


def count_outcomes(differences: list[float], tie_margin: float) -> dict[str, int]:
    """Returns the numbers of differences above `tie_margin` (win), below -`tie_margin` (lose), and others (tie)."""
    wins, losses = (sum(sign * d > tie_margin for d in differences) for sign in (1, -1))
    return {"win": wins, "tie": len(differences) - wins - losses, "lose": losses}


def wilson_interval(count: int, total: int, level: float = 0.95) -> tuple[float, float, float]:
    """Returns (share, low, high) with Wilson's score interval (1927), which is valid for shares near 0 and 1."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = count / total
    centre, scale = share + z**2 / (2 * total), 1 + z**2 / total
    half = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    return share, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def render(shares: dict[str, tuple[float, float, float]], counts: dict[str, int], width: int = 60) -> str:
    """Returns one line of text per outcome, and a bar with the three shares."""
    lines = [
        f"{name:6}{counts[name]:8}{100 * share:8.1f} %   [{100 * low:.1f}, {100 * high:.1f}]"
        for name, (share, low, high) in shares.items()
    ]
    ends = [round(width * sum(counts[name] for name in OUTCOMES[:k]) / sum(counts.values())) for k in range(4)]
    bar = "".join(letter * (end - start) for letter, start, end in zip("█▒░", ends, ends[1:], strict=False))
    return "\n".join([*lines, bar])
