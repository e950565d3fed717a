"""Groups of metrics for TensorBoard and the trackers, which sort them by name: `1_reward/score_mean`."""

import re

# The first pattern that a name begins with decides. Numbers put first what people look at first.
_GROUPS = {
    "2_evaluation": r"eval_",
    "1_training": r"(ranking_|lm_|simcse_)?loss$|accuracy|score_difference$|lr$|grad_norm$",
    "5_speed": r"seconds_|samples_per_second$|tokens_per_second$|memory_",
    "1_reward": r"score_|reward_|kl_|response_length$|eos_fraction$|uniform_group_fraction$|bad_batches$|rollbacks$",
    "4_critic": r"value_|return_|explained_variance|(grad_norm|lr)_critic$",
    "3_policy": r"policy_|approx_kl$|ratio_|clip_|dual_clip_|advantage_|entropy$|perplexity|pretrain_loss$|router_|"
    r"sampler_|(grad_norm|lr)_policy$",
}  # fmt: skip
OTHER = "6_other"


def grouped(name: str) -> str:
    """Returns a metric's name in its group, `group/name`."""
    return f"{next((group for group, names in _GROUPS.items() if re.match(names, name)), OTHER)}/{name}"
