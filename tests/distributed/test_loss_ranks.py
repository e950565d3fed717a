"""Losses with other means, ratios and clips on two ranks: the numbers of one process."""

from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_run import assert_close, final_weights, read_metrics
from tests.helpers.two_ranks import alone_and_on_two_ranks

pytestmark = pytest.mark.slow

# So few tokens per micro-batch that the ranks plan different numbers of them; the weight of the KL adapts.
FLAGS = {
    "micro_batch_tokens": 60, "maxlen_res": 16, "use_entropy_loss": True, "entropy_loss_weight": 0.1, "ppo_epochs": 2,
    "kl_in": "loss", "kl_estimator": "k2", "kl_target": 1, "kl_horizon": 20, "kl_penalty_weight": 0.5, "lr": 1e-3,
}  # fmt: skip
LOSSES = {
    "sequence": {"policy_ratio": "sequence", "pg_clip": 0.02, "pg_clip_high": 0.03},
    "group": {"num_responses_per_prompt": 2, "dual_clip": 1.1},
    "constant": {"policy_ratio": "none", "use_length_norm": True, "overlong_buffer": 8},
}


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> dict[str, Path]:
    """As of `alone_and_on_two_ranks`."""
    runs = {name: ("train_ppo", FLAGS | flags | {"loss_average": name}) for name, flags in LOSSES.items()}
    return alone_and_on_two_ranks(inputs, tmp_path_factory.mktemp("losses"), runs)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_equal_one_process(runs, name, stage):
    one, two = runs[f"{name} alone"], runs[f"{name} {stage}"]
    assert_close(two, one, rel=1e-4, abs=1e-5)
    assert read_metrics(two)[1]["kl_coef"] == pytest.approx(0.46)
    expected = final_weights(one)
    for key, tensor in final_weights(two).items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-4)
