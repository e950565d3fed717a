"""The paper's monitors (Part I §5.2), watched: what tells of a policy that collapses, and what is done then."""

from ppo.config import PPOConfig

MAX_ROLLBACKS = 3  # a run that collapses again and again wants other hyper-parameters


def alarms(metrics: dict[str, float], config: PPOConfig) -> list[str]:
    """A sentence for each metric of this step that is past its threshold; a threshold of 0 never is."""
    checks = [
        ("kl_ref", "alarm_kl", metrics["kl_ref"] > config.alarm_kl),
        ("perplexity", "alarm_perplexity", metrics["perplexity"] < config.alarm_perplexity),
        ("eos_fraction", "alarm_eos", metrics["eos_fraction"] < config.alarm_eos),
        ("response_length", "alarm_length", metrics["response_length"] < config.alarm_length),
        ("score_std", "alarm_score_std", metrics["score_std"] < config.alarm_score_std),
    ]
    return [
        f"{name} {metrics[name]:.4g} is past --{flag} {getattr(config, flag):g}"
        for name, flag, past in checks
        if past and getattr(config, flag)
    ]
