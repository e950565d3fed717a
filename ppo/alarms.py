"""Alarms for a policy that collapses: the metrics that Part I §5.2 monitors."""

from ppo.config import PPOConfig

MAX_ROLLBACKS = 3  # after that the run stops: it needs other hyper-parameters


def alarms(metrics: dict[str, float], config: PPOConfig) -> list[str]:
    """Returns a sentence per metric of this step that is beyond its threshold. Off: 0, or None for the last one."""
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
    return [f"{name} {metrics[name]:.4g} is past --{flag} {getattr(config, flag):g}" for name, flag in found]
