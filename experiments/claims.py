"""The claims, written before their runs: what each figure says, as criteria on what a run logs.

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


FIGURES = {
    "4": Figure(
        "Plain PPO collapses while its losses look fine",
        {"vanilla": 5},
        [
            Claim("Without penalty and clipping PPO drifts away and gets worse", collapses("vanilla")),
            Claim(
                "The proxy keeps rising while the true quality falls",
                [
                    Criterion("score, end - start, in deviations", of("vanilla", gained), above=2.0),
                    Criterion("gold, its best fifty steps - end", of("vanilla", below_own_best), above=0.2),
                ],
            ),
            Claim(
                "Responses run to the cap",
                [Criterion("share that ends by itself, at the end", of("vanilla", end("eos_fraction")), below=0.5)],
            ),
            Claim(
                "The losses tell nothing: the value loss is no larger than at the start, the policy's is near 0",
                [
                    Criterion("value loss, end - start", of("vanilla", change("value_loss")), below=0.0),
                    Criterion("|policy loss| at the end", of("vanilla", end_size("policy_loss")), below=0.1),
                ],
            ),
        ],
    ),
    "6": Figure(
        "Score and advantage shaping",
        {"reward_scaling": 3, "reward_clip_0.3": 3, "reward_clip_0.8": 3, "advantage_clip_0.12": 3},
        [
            Claim("Scaling of scores alone collapses", collapses("reward_scaling")),
            Claim("Scores clipped at 0.3 hold", holds("reward_clip_0.3")),
            Claim("Advantages clipped at 0.12 hold", holds("advantage_clip_0.12")),
            Claim("Scores clipped at 0.8 collapse", collapses("reward_clip_0.8")),
        ],
    ),
    "7": Figure(
        "KL penalty and importance sampling",
        {"kl_only": 3, "importance_only": 3, "kl_and_importance": 3},
        [
            Claim("The KL penalty is stable", holds("kl_only")),
            Claim(
                "Importance sampling alone drifts",
                [Criterion("importance_only: KL at the end", of("importance_only", end("kl_ref")), above=FAR)],
            ),
            Claim(
                "Both together are the most stable, with the lowest score",
                [
                    Criterion(
                        "KL at the end, both - penalty alone",
                        between("kl_and_importance", "kl_only", end("kl_ref")), below=0.0,
                    ),
                    Criterion(
                        "score at the end, both - penalty alone",
                        between("kl_and_importance", "kl_only", end("score_mean")), below=0.0,
                    ),
                    Criterion(
                        "score at the end, both - importance sampling alone",
                        between("kl_and_importance", "importance_only", end("score_mean")), below=0.0,
                    ),
                ],
            ),
        ],
    ),
    "8": Figure(
        "Where policy and critic start",
        {"ppo_max": 5, "policy_without_sft": 3, "critic_from_sft": 3, "no_critic_pretraining": 3},
        [
            Claim(
                "A policy without SFT fails: it ends below where the one with SFT starts",
                [
                    Criterion(
                        "gold, without SFT at the end - with SFT at the start",
                        lambda runs: [
                            a.end("gold") - b.start("gold")
                            for a, b in zip(runs["policy_without_sft"], runs["ppo_max"], strict=False)
                        ],
                        below=0.0,
                    )
                ],
            ),
            Claim(
                "A critic from the SFT model does as well as one from the reward model",
                [
                    Criterion(
                        "gold at the end, from SFT - from the reward model",
                        between("critic_from_sft", "ppo_max", end("gold")), above=-0.1,
                    ),
                    Criterion("score, from SFT, in deviations", of("critic_from_sft", gained), above=0.5),
                ],
            ),
            Claim(
                "Pre-training the critic takes the early peak of the value loss away",
                [
                    Criterion(
                        "highest early value loss, without - with",
                        between("no_critic_pretraining", "ppo_max", early_value_loss), above=0.0,
                    )
                ],
            ),
        ],
    ),
    "9": Figure(
        "PPO-max over 5,000 steps",
        {"ppo_max": 5},
        [
            Claim("It stays near the reference and no worse than at the start", holds("ppo_max")),
            Claim(
                "The score rises, and the true quality with it",
                [
                    Criterion("score, end - start, in deviations", of("ppo_max", gained), above=0.5),
                    Criterion("gold, end - start", of("ppo_max", change("gold")), above=0.0),
                ],
            ),
            Claim(
                "The length settles",
                [
                    Criterion(
                        "|length, last fifth - the fifth before|, tokens",
                        of("ppo_max", lambda r: abs(r.part("response_length", 4) - r.part("response_length", 3))),
                        below=1.0,
                    )
                ],
            ),
            Claim(
                "The KL has a peak and falls back from it",
                [
                    Criterion(
                        "KL, highest of 50 steps - end, as a share of the first",
                        of("ppo_max", lambda r: 1 - r.end("kl_ref") / max(r.smooth("kl_ref", 5))), above=0.2,
                    )
                ],
            ),
        ],
    ),
    "12": Figure(
        "The alignment tax, and the pre-training loss",
        {"ppo_max_short": 3, "ptx": 3},
        [
            Claim(
                "PPO costs language: people's replies get less likely",
                [Criterion("NLL of held-out replies, end - start", of("ppo_max_short", tax), above=0.0)],
            ),
            Claim(
                "The pre-training loss gives part of it back",
                [Criterion("the same, with ptx - without", between("ptx", "ppo_max_short", tax), below=0.0)],
            ),
        ],
    ),
    "15": Figure(
        "Weight of the KL penalty",
        {"ppo_max": 5, "kl_0.1": 3, "kl_0.2": 3},
        [
            Claim(
                "A looser penalty gives a higher score and goes further",
                [
                    Criterion(
                        f"{name} at the end, {looser} - {tighter}",
                        between(looser, tighter, end(metric)), above=0.0,
                    )
                    for metric, name in (("score_mean", "score"), ("kl_ref", "KL"))
                    for looser, tighter in (("ppo_max", "kl_0.1"), ("kl_0.1", "kl_0.2"))
                ],
            ),
            Claim("All of them are stable", [*holds("ppo_max"), *holds("kl_0.1"), *holds("kl_0.2")]),
        ],
    ),
    "16": Figure(
        "An entropy bonus",
        {"entropy_bonus": 3, "entropy_bonus_clipped": 3},
        [
            Claim(
                "Without a limit it collapses: the entropy runs away and the quality falls",
                [
                    Criterion("entropy, end - start, nats a token", of("entropy_bonus", change("entropy")), above=1.0),
                    Criterion("gold, end - start", of("entropy_bonus", change("gold")), below=0.0),
                ],
            ),
            Claim("With a limit it holds", holds("entropy_bonus_clipped")),
        ],
    ),
    "17": Figure(
        "Surrogate clipping alone",
        {"vanilla": 3, "importance_only": 3},
        [
            Claim("It does not prevent collapse", collapses("vanilla")),
            Claim(
                "Nor does it end nearer to the reference than without",
                [
                    Criterion(
                        "KL at the end, with - without",
                        between("vanilla", "importance_only", end("kl_ref")), above=-FAR,
                    )
                ],
            ),
        ],
    ),
    "18": Figure(
        "Gradient clipping alone",
        {"gradient_clip_only": 3},
        [Claim("It does not prevent collapse", collapses("gradient_clip_only"))],
    ),
    "19": Figure(
        "lambda of the advantages",
        {"ppo_max": 5, "lambda_0": 3, "lambda_0.9": 3, "lambda_1": 3},
        [
            Claim(
                "lambda 0 is unstable: it learns less, or falls",
                [
                    Criterion(
                        "gold at the end, 0 - 0.95", between("lambda_0", "ppo_max", end("gold")), below=0.0
                    )
                ],
            ),
            Claim(
                "lambda 1 drifts further than 0.95",
                [
                    Criterion(
                        "KL at the end, 1 - 0.95", between("lambda_1", "ppo_max", end("kl_ref")), above=0.0
                    )
                ],
            ),
            Claim("0.9 and 0.95 are stable", [*holds("lambda_0.9"), *holds("ppo_max")]),
        ],
    ),
}  # fmt: skip

# Beyond the paper: PPO-max without one of its parts, against all of it at the same step.
PARTS = {
    "no_kl_penalty": "KL penalty",
    "no_reward_clip": "score clipping",
    "no_reward_norm": "score normalisation and clipping",
    "no_value_clip": "value clipping",
    "no_critic_pretraining": "critic pre-training",
    "no_advantage_norm": "advantage normalisation",
    "no_surrogate_clip": "surrogate clipping",
    "no_gradient_clip": "gradient clipping",
}
FIGURES["parts"] = Figure("PPO-max, one part taken away", {"ppo_max": 5} | dict.fromkeys(PARTS, 3), [])
