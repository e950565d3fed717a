"""The claims of the paper's figures as criteria on logged metrics, written before the runs (see criteria.py)."""

from collections.abc import Callable

from experiments.claims_estimators import EPOCHS_FIGURE, ESTIMATOR_FIGURE, LONG_FIGURES, LORA_FIGURE
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
    of,
    stable,
    tax,
)
from experiments.curves import Run


def claim(text: str, criterion: str, setting: str, measure: Callable[[Run], float], **bound: float) -> Claim:
    """Returns a claim with one criterion on one setting."""
    return Claim(text, [Criterion(criterion, of(setting, measure), **bound)])


def difference(criterion: str, first: str, second: str, measure: Callable[[Run], float], **bound: float) -> Criterion:
    """Returns a criterion on the difference between two settings."""
    return Criterion(criterion, between(first, second, measure), **bound)


FIGURES = {
    "4": Figure("Plain PPO collapses while its losses look normal", {"vanilla": 5}, [
        Claim("Without penalty and clipping, PPO moves far from the reference and gets worse", collapses("vanilla")),
        Claim("The proxy score keeps rising while the gold score falls", [
            Criterion("score, end - start, in standard deviations", of("vanilla", gained), above=2.0),
            Criterion("gold, best fifty steps - end", of("vanilla", below_own_best), above=0.2),
        ]),
        claim("Responses reach the length limit", "share that ends by itself, at the end",
              "vanilla", end("eos_fraction"), below=0.5),
        Claim("The losses do not show it: the value loss is not larger than at the start, the policy loss is near 0", [
            Criterion("value loss, end - start", of("vanilla", change("value_loss")), below=0.0),
            Criterion("|policy loss| at the end", of("vanilla", end_size("policy_loss")), below=0.1),
        ]),
    ]),
    "6": Figure("Score and advantage shaping",
                dict.fromkeys(("reward_scaling", "reward_clip_0.3", "reward_clip_0.8", "advantage_clip_0.12"), 3), [
        Claim("Score scaling alone collapses", collapses("reward_scaling")),
        Claim("Scores clipped at 0.3 are stable", stable("reward_clip_0.3")),
        Claim("Advantages clipped at 0.12 are stable", stable("advantage_clip_0.12")),
        Claim("Scores clipped at 0.8 collapse", collapses("reward_clip_0.8")),
    ]),
    "7": Figure("KL penalty and importance sampling",
                dict.fromkeys(("kl_only", "importance_only", "kl_and_importance"), 3), [
        Claim("The KL penalty is stable", stable("kl_only")),
        claim("Importance sampling alone drifts", "importance_only: KL at the end",
              "importance_only", end("kl_ref"), above=FAR),
        Claim("Both together are the most stable, with the lowest score", [
            difference("KL at the end, both - penalty alone", "kl_and_importance", "kl_only", end("kl_ref"), below=0.0),
            difference("score at the end, both - penalty alone",
                       "kl_and_importance", "kl_only", end("score_mean"), below=0.0),
            difference("score at the end, both - importance sampling alone",
                       "kl_and_importance", "importance_only", end("score_mean"), below=0.0),
        ]),
    ]),
    "8": Figure("Initialisation of policy and critic", dict.fromkeys(
                ("ppo_max_short", "policy_without_sft", "critic_from_sft", "no_critic_pretraining"), 3), [
        Claim("A policy without SFT fails: it ends below the start of the one with SFT", [Criterion(
            "gold, without SFT at the end - with SFT at the start",
            lambda runs: [a.end("gold") - b.start("gold")
                          for a, b in zip(runs["policy_without_sft"], runs["ppo_max_short"], strict=False)],
            below=0.0,
        )]),
        Claim("A critic from the SFT model is as good as one from the reward model", [
            difference("gold at the end, from SFT - from the reward model",
                       "critic_from_sft", "ppo_max_short", end("gold"), above=-0.1),
            Criterion("score, from SFT, in standard deviations", of("critic_from_sft", gained), above=0.5),
        ]),
        Claim("Pre-training the critic removes the early peak of the value loss", [
            difference("highest early value loss, without - with",
                       "no_critic_pretraining", "ppo_max_short", early_value_loss, above=0.0),
        ]),
    ]),
    "9": Figure("PPO-max over 5,000 steps", {"ppo_max": 5}, [
        Claim("It stays near the reference and is not worse than at the start", stable("ppo_max")),
        Claim("The proxy score and the gold score rise", [
            Criterion("score, end - start, in standard deviations", of("ppo_max", gained), above=0.5),
            Criterion("gold, end - start", of("ppo_max", change("gold")), above=0.0),
        ]),
        claim("The response length converges", "|length, last fifth - the fifth before|, tokens", "ppo_max",
              lambda r: abs(r.part("response_length", 4) - r.part("response_length", 3)), below=1.0),
        claim("The KL has a peak and falls again", "KL, highest of 50 steps - end, as a share of the first", "ppo_max",
              lambda r: 1 - r.end("kl_ref") / max(r.smooth("kl_ref", 5)), above=0.2),
    ]),
    "12": Figure("The alignment tax, and the pre-training loss", {"ppo_max_short": 3, "ptx": 3}, [
        claim("PPO reduces the likelihood of human replies", "NLL of held-out replies, end - start",
              "ppo_max_short", tax, above=0.0),
        Claim("The pre-training loss restores a part of it", [
            difference("the same, with ptx - without", "ptx", "ppo_max_short", tax, below=0.0),
        ]),
    ]),
    "15": Figure("Weight of the KL penalty", dict.fromkeys(("ppo_max_short", "kl_0.1", "kl_0.2"), 3), [
        Claim("A weaker penalty gives a higher score and a larger KL", [
            difference(f"{name} at the end, {weaker} - {stronger}", weaker, stronger, end(metric), above=0.0)
            for metric, name in (("score_mean", "score"), ("kl_ref", "KL"))
            for weaker, stronger in (("ppo_max_short", "kl_0.1"), ("kl_0.1", "kl_0.2"))
        ]),
        Claim("All of them are stable", [*stable("ppo_max_short"), *stable("kl_0.1"), *stable("kl_0.2")]),
    ]),
    "16": Figure("An entropy bonus", {"entropy_bonus": 3, "entropy_bonus_clipped": 3}, [
        Claim("Without a limit it collapses: the entropy grows and the gold score falls", [
            Criterion("entropy, end - start, nats per token", of("entropy_bonus", change("entropy")), above=1.0),
            Criterion("gold, end - start", of("entropy_bonus", change("gold")), below=0.0),
        ]),
        Claim("With a limit it is stable", stable("entropy_bonus_clipped")),
    ]),
    "17": Figure("Surrogate clipping alone", {"vanilla": 3, "importance_only": 3}, [
        Claim("It does not prevent collapse", collapses("vanilla")),
        Claim("It does not end nearer to the reference than without clipping", [
            difference("KL at the end, with - without", "vanilla", "importance_only", end("kl_ref"), above=-FAR),
        ]),
    ]),
    "18": Figure("Gradient clipping alone", {"gradient_clip_only": 3}, [
        Claim("It does not prevent collapse", collapses("gradient_clip_only")),
    ]),
    "19": Figure("lambda of the advantages",
                 dict.fromkeys(("ppo_max_short", "lambda_0", "lambda_0.9", "lambda_1"), 3), [
        Claim("lambda 0 is unstable: it learns less, or falls", [
            difference("gold at the end, 0 - 0.95", "lambda_0", "ppo_max_short", end("gold"), below=0.0),
        ]),
        Claim("lambda 1 drifts further than 0.95", [
            difference("KL at the end, 1 - 0.95", "lambda_1", "ppo_max_short", end("kl_ref"), above=0.0),
        ]),
        Claim("0.9 and 0.95 are stable", [*stable("lambda_0.9"), *stable("ppo_max_short")]),
    ]),
    "missing_eos": Figure("a penalty for truncated responses", {"missing_eos_0": 3, "missing_eos_1": 3}, [
        Claim("With a penalty of one standard deviation, more responses end by themselves", [
            difference("share that ends by itself, at the end, 1 - 0",
                       "missing_eos_1", "missing_eos_0", end("eos_fraction"), above=0.0),
        ]),
        Claim("It does not reduce the gold score", [
            difference("gold at the end, 1 - 0", "missing_eos_1", "missing_eos_0", end("gold"), above=-0.05),
        ]),
    ]),
}  # fmt: skip

# Beyond the paper: PPO-max without one of its parts, compared with PPO-max at the same step.
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
FIGURES["parts"] = Figure(
    "PPO-max without one of its parts", {"ppo_max_short": 3} | dict.fromkeys(PARTS, 3), [], PARTS, "ppo_max_short"
)
FIGURES |= {"critic": ESTIMATOR_FIGURE, "lora": LORA_FIGURE, "epochs": EPOCHS_FIGURE, **LONG_FIGURES}
