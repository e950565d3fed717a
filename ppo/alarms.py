"""Alarms for a policy that collapses: the metrics that Part I §5.2 monitors. The rule for best/. No torch."""

from ppo.flags.monitoring import AlarmFlags

MAX_ROLLBACKS = 3  # after that the run stops: it needs other hyper-parameters
MEANINGS = {
    "kl_ref": "the policy is so far from the reference that a higher score may no longer mean better answers",
    "perplexity": "the policy repeats itself",
    "eos_fraction": "most responses are cut off, since they do not end by themselves",
    "response_length": "the policy hardly says anything any more",
    "score_std": "all responses get nearly the same score, so that there is nothing to learn from",
    "explained_variance": "the critic predicts the returns worse than wanted, so that the advantages are noise",
}


def past_limits(metrics: dict[str, float], config: AlarmFlags) -> list[tuple[str, str]]:
    """Returns (metric, flag) per metric of this step that is beyond its threshold. Off: 0, or None for the last one."""
    checks = [
        ("kl_ref", "alarm_kl", metrics["kl_ref"] > config.alarm_kl),
        ("perplexity", "alarm_perplexity", metrics["perplexity"] < config.alarm_perplexity),
        ("eos_fraction", "alarm_eos", metrics["eos_fraction"] < config.alarm_eos),
        ("response_length", "alarm_length", metrics["response_length"] < config.alarm_length),
        ("score_std", "alarm_score_std", metrics["score_std"] < config.alarm_score_std),
    ]
    found = [(name, flag) for name, flag, beyond in checks if beyond and getattr(config, flag)]
    least, name = config.alarm_explained_variance, "explained_variance"
    # While only the critic trains there is no loss of the policy.
    if least is not None and "policy_loss" in metrics and metrics.get(name, least) < least:
        found.append((name, "alarm_explained_variance"))
    return found


def alarms(metrics: dict[str, float], config: AlarmFlags) -> list[str]:
    """Returns a sentence per metric of this step that is beyond its threshold."""
    past = past_limits(metrics, config)
    return [f"{name} {metrics[name]:.4g} is past --{flag} {getattr(config, flag):g}" for name, flag in past]


def is_best(metrics: dict[str, float], best_score: float, max_kl: float) -> bool:
    """Whether the mean score is the best so far and the KL at most max_kl: more means reward hacking (Part I §5.2)."""
    return metrics["kl_ref"] <= max_kl and metrics["score_mean"] > best_score
