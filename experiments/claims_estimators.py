"""Claims about estimators, several epochs per buffer and long answers, written before their runs (see criteria.py).

Estimators: NAME@kl_penalty_weight=W for four weights W gives four points (KL, gold) at the end, per seed. They and the
start (0, gold of the first ten steps of the estimator `gae`) are joined by straight lines: the frontier. Dr. GRPO's
advantages are RLOO's times a constant, which advantage normalisation removes: here they are one estimator.
"""

from experiments.criteria import (
    FAR,
    Claim,
    Criterion,
    Figure,
    at_equal_seconds,
    between,
    change,
    early_value_loss,
    end,
    frontier_difference,
    of,
    stable,
)

WEIGHTS = (0.02, 0.05, 0.1, 0.2)
CRITIC = "gae"
CRITIC_FREE = {
    "rloo": "RLOO", "grpo": "GRPO", "reinforce_pp": "REINFORCE++",
}  # fmt: skip
# Seconds of a step of GAE in steps of the other, by benchmarks/estimators.py (28 November 2026, three rounds). Measured
# after the figure's first run, which shared its cores, so that its own seconds mean nothing.
COST = {"rloo": 1.3, "grpo": 1.4, "reinforce_pp": 1.4}
AT_KL = 1.5  # nats per response, where gold is compared
MARGIN = 0.05  # of gold; the standard deviation of the gold score of single answers is about 0.5


def weighted(name: str) -> list[str]:
    """Returns the settings of an estimator's frontier."""
    return [f"{name}@kl_penalty_weight={weight:g}" for weight in WEIGHTS]


ESTIMATORS = [CRITIC, *CRITIC_FREE]
ESTIMATOR_FIGURE = Figure(
    "Is the critic worth its cost? Answers of 16 tokens",
    {setting: 5 for name in ESTIMATORS for setting in weighted(name)}, [
        Claim(f"No estimator without a critic is worse than PPO-max's GAE by more than {MARGIN:g} at equal KL", [
            Criterion(f"gold at a KL of {AT_KL:g} nats, {label} - GAE",
                      frontier_difference(weighted(name), weighted(CRITIC), AT_KL), above=-MARGIN)
            for name, label in CRITIC_FREE.items()
        ]),
        Claim("GAE with a critic is better than each of them at equal KL and equal responses", [
            Criterion(f"gold at a KL of {AT_KL:g} nats, GAE - {label}",
                      frontier_difference(weighted(CRITIC), weighted(name), AT_KL), above=0.0)
            for name, label in CRITIC_FREE.items()
        ]),
        Claim("At the default KL weight and equal responses, GAE ends with a higher gold score", [
            Criterion(f"gold at the end, GAE - {label}",
                      between(weighted(CRITIC)[1], weighted(name)[1], end("gold")), above=0.0)
            for name, label in CRITIC_FREE.items()
        ]),
        Claim("At the default KL weight and equal seconds, GAE ends with a higher gold score", [
            Criterion(f"gold when GAE has used the seconds of the other run, GAE - {label}",
                      at_equal_seconds(weighted(CRITIC)[1], weighted(name)[1], "gold", COST[name], 20), above=0.0)
            for name, label in CRITIC_FREE.items()
        ]),
    ], frontiers={name: weighted(name) for name in ESTIMATORS},
)  # fmt: skip

# With ten times the learning rate of all weights, as the claims were written, the policy moved further than with all
# weights. Three times was added afterwards: seed 101 had shown it on the frontier of all weights. Three seeds became
# eight after two runs of them, with AVX2 and AVX-512, had not agreed.
LORA = {"lora": "ten times the rate", "lora@lr=3e-4": "three times the rate"}
LORA_FIGURE = Figure(
    "Adapters instead of all weights", {setting: 8 for name in (*LORA, CRITIC) for setting in weighted(name)}, [
        Claim(f"{label.capitalize()}: at equal KL, gold is not lower by more than {MARGIN:g} than with all weights", [
            Criterion(f"gold at a KL of {AT_KL:g} nats, adapters - all weights",
                      frontier_difference(weighted(name), weighted(CRITIC), AT_KL), above=-MARGIN),
        ])
        for name, label in LORA.items()
    ] + [
        Claim(f"{label.capitalize()}: gold rises at every KL weight", [
            Criterion(f"gold, end - start, {setting.rpartition('@')[2]}", of(setting, change("gold")), above=0.0)
            for setting in weighted(name)
        ])
        for name, label in LORA.items()
    ] + [
        Claim(f"{label.capitalize()}, for the critic the same as with all weights: it explains its returns as well", [
            Criterion("explained variance at the end, adapters - all weights",
                      between(weighted(name)[1], weighted(CRITIC)[1], end("explained_variance")), above=-MARGIN),
        ])
        for name, label in LORA.items()
    ], frontiers={name: weighted(name) for name in (*LORA, CRITIC)},
)  # fmt: skip

# PPO-max with four passes over each buffer, and without one of its parts.
EPOCH_PARTS = {
    "epochs_no_surrogate_clip": "surrogate clipping",
    "epochs_no_value_clip": "value clipping",
    "epochs_no_kl_penalty": "KL penalty",
    "epochs_no_reward_clip": "score clipping",
    "epochs_no_advantage_norm": "advantage normalisation",
    "epochs_no_critic_pretraining": "critic pre-training",
}
EPOCHS_FIGURE = Figure(
    "What prevents collapse with four epochs per buffer", {"epochs": 3} | dict.fromkeys(EPOCH_PARTS, 3), [
        Claim("Ratios and values reach their clips", [
            Criterion("share of tokens without a policy gradient, clipped", of("epochs", end("clip_fraction")),
                      above=0.01),
            Criterion("share of tokens without a value gradient, clipped",
                      of("epochs", end("value_clip_fraction")), above=0.01),
        ]),
        Claim("PPO-max is stable", stable("epochs")),
        Claim("Surrogate clipping holds the policy nearer to the reference", [
            Criterion("KL at the end, without - with", between("epochs_no_surrogate_clip", "epochs", end("kl_ref")),
                      above=0.0),
        ]),
        Claim("Without surrogate clipping it does not collapse", [
            Criterion("KL at the end, without", of("epochs_no_surrogate_clip", end("kl_ref")), below=FAR),
            Criterion("gold, end - start, without", of("epochs_no_surrogate_clip", change("gold")), above=0.0),
        ]),
        Claim("Value clipping makes the values worse", [
            Criterion("explained variance at the end, without - with",
                      between("epochs_no_value_clip", "epochs", end("explained_variance")), above=0.0),
        ]),
        Claim("Without the KL penalty, the policy goes further and its gold score is lower", [
            Criterion(f"{name} at the end, without - with", between("epochs_no_kl_penalty", "epochs", measure), **bound)
            for name, measure, bound in (("KL", end("kl_ref"), {"above": 0.0}), ("gold", end("gold"), {"below": 0.0}))
        ]),
    ], EPOCH_PARTS, "epochs",
)  # fmt: skip


LONG = {
    "rloo": "RLOO", "reinforce_pp": "REINFORCE++", "lambda_0": "lambda 0", "lambda_1": "lambda 1",
    "decoupled": "lambda 1 for the critic alone", "length_adaptive": "a lambda by the answer's length",
    "no_critic_pretraining": "no critic pre-training",
}  # fmt: skip


def long_figure(whole: str, title: str) -> Figure:
    """Returns the figure of answers of up to 64 tokens whose reward depends on a few words."""

    def gained(name: str, bound: str) -> Criterion:
        text = f"score at the end, {LONG[name]} - GAE with lambda 0.95"
        return Criterion(text, between(f"{whole}@{name}", whole, end("score_mean")), **{bound: 0.0})

    parts = {f"{whole}@{name}": label for name, label in LONG.items()}
    seeds = {whole: 5} | {f"{whole}@{name}": 5 if name in CRITIC_FREE else 3 for name in LONG}
    return Figure(title, seeds, [
        Claim("A critic pays: the estimators without one end lower at equal responses",
              [gained("rloo", "below"), gained("reinforce_pp", "below")]),
        Claim("Lambda 0 learns less", [gained("lambda_0", "below")]),
        Claim("Lambda 1 learns less", [gained("lambda_1", "below")]),
        Claim("A critic that learns whole returns helps (VC-PPO)", [gained("decoupled", "above")]),
        Claim("A lambda by the answer's length helps (VAPO)", [gained("length_adaptive", "above")]),
        Claim("Critic pre-training removes the early peak of the value loss", [
            Criterion("highest early value loss, without - with",
                      between(f"{whole}@no_critic_pretraining", whole, early_value_loss), above=0.0),
        ]),
        Claim("Critic pre-training helps", [gained("no_critic_pretraining", "below")]),
    ], parts, whole)  # fmt: skip


LONG_FIGURES = {
    "long_early": long_figure("long", "Credit in answers of up to 64 tokens: the first words decide"),
    "long_late": long_figure("long@late", "Credit in answers of up to 64 tokens: the last words decide"),
}
