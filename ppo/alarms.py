"""Alarms for a policy that collapses: the metrics that Part I §5.2 monitors."""

from ppo.config import PPOConfig

MAX_ROLLBACKS = 3  # after that the run stops: it needs other hyper-parameters


def alarms(metrics: dict[str, float], config: PPOConfig) -> list[str]:
    """Returns a sentence per metric of this step that is beyond its threshold. A threshold of 0 is off."""
    checks = [
        ("kl_ref", "alarm_kl", metrics["kl_ref"] > config.alarm_kl),
        ("perplexity", "alarm_perplexity", metrics["perplexity"] < config.alarm_perplexity),
        ("eos_fraction", "alarm_eos", metrics["eos_fraction"] < config.alarm_eos),
        ("response_length", "alarm_length", metrics["response_length"] < config.alarm_length),
        ("score_std", "alarm_score_std", metrics["score_std"] < config.alarm_score_std),
    ]
    return [
        f"{name} {metrics[name]:.4g} is past --{flag} {getattr(config, flag):g}"
        for name, flag, beyond in checks
        if beyond and getattr(config, flag)
    ]
