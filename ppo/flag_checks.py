"""Checks of flags of `train_ppo.py` that exclude or need each other. No torch."""

from ppo.estimators import needs_of
from utils.errors import UserError
from utils.flags.checks import is_default, replace_default


def check_losses(config) -> None:
    """Raises UserError if flags of scores and losses contradict each other."""
    limit = config.overlong_length or config.maxlen_res
    if config.overlong_buffer > limit:
        raise UserError(
            f"--overlong_buffer {config.overlong_buffer} is longer than a response may be ({limit} tokens): lower it"
        )
    if 0 < config.dual_clip <= 1:
        raise UserError(f"--dual_clip {config.dual_clip:g} must be above 1, as in 3; 0: none")
    if config.policy_ratio == "none" and (config.pg_clip_high is not None or config.dual_clip):
        flag = "--dual_clip" if config.pg_clip_high is None else "--pg_clip_high"
        raise UserError(f"{flag} with --policy_ratio none, which has no ratio to clip; drop one of the flags")
    if config.overlong_length and not config.overlong_buffer:
        raise UserError(f"--overlong_length {config.overlong_length} needs --overlong_buffer above 0")
    if config.pg_clip_high is not None and not (config.use_policy_loss_clip and config.pg_clip_high > 0):
        raise UserError(
            f"--pg_clip_high {config.pg_clip_high:g} needs --use_policy_loss_clip true and a number above 0"
        )
    if config.kl_target and not config.kl_penalty_weight:
        raise UserError("--kl_target needs a weight to adapt: pass --kl_penalty_weight above 0")


def check_estimator(config) -> None:
    """Raises UserError if flags of the estimator, groups and critic contradict each other."""
    needs, size = needs_of(config.advantage_estimator), config.num_responses_per_prompt
    estimator = f"--advantage_estimator {config.advantage_estimator}"
    if "groups" in needs and not config.has_critic and size < 2:
        raise UserError(f"{estimator} compares responses to the same prompt: pass --num_responses_per_prompt 2 or more")
    if config.drop_uniform_groups and size < 2:
        raise UserError("--drop_uniform_groups needs groups: pass --num_responses_per_prompt 2 or more")
    if config.alarm_explained_variance is not None and not config.has_critic:
        raise UserError(f"--alarm_explained_variance {config.alarm_explained_variance:g}: {estimator} has no critic")
    if not config.has_critic:
        for name in ("value_norm", "critic_epochs", "critic_updates_per_policy_update"):
            if not is_default(config, name):
                raise UserError(f"--{name} {getattr(config, name)}: {estimator} has no critic; drop it")
        replace_default(config, "critic_pretrain_steps", 0, f"{estimator} has no critic")
        if config.critic_pretrain_steps:
            raise UserError(
                f"--critic_pretrain_steps {config.critic_pretrain_steps}: {estimator} has no critic; drop it"
            )


def check_adapters(config) -> None:
    """Raises UserError for flags that do not work with --lora_rank."""
    if config.critic_lora_rank and not config.has_critic:
        raise UserError(f"--critic_lora_rank {config.critic_lora_rank}: this run has no critic; leave it out")
    wrong = {
        f"--reference {config.reference}": config.reference != "frozen",
        f"--policy_ema {config.policy_ema:g}": config.policy_ema,
        f"--lora_dropout {config.lora_dropout:g}": config.lora_dropout,
    }
    why = {"--lora_dropout": "in PPO the update would have other log-probabilities than scoring"}
    for flag, is_on in wrong.items():
        if config.lora_rank and is_on:
            reason = why.get(flag.split()[0], "averages of adapters are not implemented")
            raise UserError(f"{flag} does not work with --lora_rank: {reason}; drop one of the flags")


def check_rollout_engine(config) -> None:
    """Raises UserError if flags of the rollout engine contradict each other."""
    engine, kind = f"--rollout_engine {config.rollout_engine}", f"--sampler_correction {config.sampler_correction}"
    if config.reuse_sampler_logprobs and config.rollout_engine == "vllm":
        problem = f"--reuse_sampler_logprobs with {engine}: vLLM's log-probabilities are compared with those of the"
        raise UserError(f"{problem} policy's own forward, which cannot be left out; drop one of the flags")
    if config.sampler_correction != "none" and config.rollout_engine == "own":
        raise UserError(f"{kind} with {engine}, which has no difference to correct; drop one of the flags")
    if config.sampler_correction != "none" and (config.topp < 1.0 or config.repetition_penalty != 1.0):
        raise UserError(
            f"{kind} with --topp {config.topp:g} --repetition_penalty {config.repetition_penalty:g}: the distribution "
            "that is sampled is vLLM's only at 1 and 1; pass these, or --sampler_correction none"
        )
