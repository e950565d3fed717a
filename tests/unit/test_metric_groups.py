"""utils/run/metric_groups.py: every documented metric has a group, which decides what TensorBoard shows first."""

import re
from pathlib import Path

import pytest

from utils.run.metric_groups import OTHER, grouped

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
EXPECTED = {
    "score_mean": "1_reward", "kl_ref": "1_reward", "reward_seconds_long": "1_reward", "response_length": "1_reward",
    "score_difference": "1_training", "loss": "1_training", "accuracy_harmless": "1_training", "lr": "1_training",
    "eval_score_mean": "2_evaluation", "eval_loss": "2_evaluation", "eval_value_slope": "2_evaluation",
    "policy_loss": "3_policy", "grad_norm_policy": "3_policy", "pretrain_loss": "3_policy", "lr_policy": "3_policy",
    "value_loss": "4_critic", "value_clip_fraction": "4_critic", "explained_variance_4": "4_critic",
    "grad_norm_critic": "4_critic", "return_noise": "4_critic", "seconds_rollout": "5_speed",
    "memory_peak_gb": "5_speed", "tokens_per_second": "5_speed", "something_new": "6_other", "lossy": "6_other",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_a_group(name):
    assert grouped(name) == f"{EXPECTED[name]}/{name}"


def test_every_documented_metric_has_one():
    """What only exists with eval_ in front is marked with a star."""
    cells = [line.split("|")[1] for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith("| `")]
    found = [(name, star) for cell in cells for name, star in re.findall(r"`(\w+)…?`(\\\*)?", cell)]
    assert len(found) > 70
    names = [f"eval_{name}" if star else name for name, star in found]
    assert [name for name in names if grouped(name).startswith(OTHER)] == []
