"""The claims, written before their runs: what each figure says, as criteria (criteria.py) on what a run logs."""

from experiments.criteria import (
    FAR,
    Claim,
    Criterion,
    Figure,
    below_own_best,
    between,
    change,
    collapses,
    early_value_loss,
    end,
    end_size,
    gained,
    holds,
    of,
    tax,
)

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
        {"ppo_max_short": 3, "policy_without_sft": 3, "critic_from_sft": 3, "no_critic_pretraining": 3},
        [
            Claim(
                "A policy without SFT fails: it ends below where the one with SFT starts",
                [
                    Criterion(
                        "gold, without SFT at the end - with SFT at the start",
                        lambda runs: [
                            a.end("gold") - b.start("gold")
                            for a, b in zip(runs["policy_without_sft"], runs["ppo_max_short"], strict=False)
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
                        between("critic_from_sft", "ppo_max_short", end("gold")), above=-0.1,
                    ),
                    Criterion("score, from SFT, in deviations", of("critic_from_sft", gained), above=0.5),
                ],
            ),
            Claim(
                "Pre-training the critic takes the early peak of the value loss away",
                [
                    Criterion(
                        "highest early value loss, without - with",
                        between("no_critic_pretraining", "ppo_max_short", early_value_loss), above=0.0,
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
        {"ppo_max_short": 3, "kl_0.1": 3, "kl_0.2": 3},
        [
            Claim(
                "A looser penalty gives a higher score and goes further",
                [
                    Criterion(
                        f"{name} at the end, {looser} - {tighter}",
                        between(looser, tighter, end(metric)), above=0.0,
                    )
                    for metric, name in (("score_mean", "score"), ("kl_ref", "KL"))
                    for looser, tighter in (("ppo_max_short", "kl_0.1"), ("kl_0.1", "kl_0.2"))
                ],
            ),
            Claim("All of them are stable", [*holds("ppo_max_short"), *holds("kl_0.1"), *holds("kl_0.2")]),
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
        {"ppo_max_short": 3, "lambda_0": 3, "lambda_0.9": 3, "lambda_1": 3},
        [
            Claim(
                "lambda 0 is unstable: it learns less, or falls",
                [
                    Criterion(
                        "gold at the end, 0 - 0.95", between("lambda_0", "ppo_max_short", end("gold")), below=0.0
                    )
                ],
            ),
            Claim(
                "lambda 1 drifts further than 0.95",
                [
                    Criterion(
                        "KL at the end, 1 - 0.95", between("lambda_1", "ppo_max_short", end("kl_ref")), above=0.0
                    )
                ],
            ),
            Claim("0.9 and 0.95 are stable", [*holds("lambda_0.9"), *holds("ppo_max_short")]),
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
FIGURES["missing_eos"] = Figure(
    "a penalty for responses that are cut at the cap",
    {"missing_eos_0": 3, "missing_eos_1": 3},
    [
        Claim(
            "With a penalty of one deviation more responses end by themselves",
            [
                Criterion(
                    "share that ends by itself, at the end, 1 - 0",
                    between("missing_eos_1", "missing_eos_0", end("eos_fraction")),
                    above=0.0,
                )
            ],
        ),
        Claim(
            "It costs no quality",
            [Criterion("gold at the end, 1 - 0", between("missing_eos_1", "missing_eos_0", end("gold")), above=-0.05)],
        ),
    ],
)
FIGURES["parts"] = Figure("PPO-max, one part taken away", {"ppo_max_short": 3} | dict.fromkeys(PARTS, 3), [])
