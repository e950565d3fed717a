"""The critic on two ranks: offline pre-training and value normalisation give the numbers of one process."""

from pathlib import Path

import pytest

from tests.helpers.tiny_run import assert_close, final_weights
from tests.helpers.two_ranks import alone_and_on_two_ranks

pytestmark = pytest.mark.slow

RUNS = {
    "offline": ("ppo.critic", {"pretrain": True, "critic_pretrain_steps": 3, "value_norm": "popart"}),
    "popart": ("train_ppo", {"value_norm": "popart", "critic_pretrain_steps": 1, "critic_epochs": 2}),
    "running": ("train_ppo", {"value_norm": "running", "critic_updates_per_policy_update": 2}),
}


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> dict[str, Path]:
    """As of `alone_and_on_two_ranks`."""
    return alone_and_on_two_ranks(inputs, tmp_path_factory.mktemp("critics"), RUNS)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_process(runs, name, stage):
    one, two = runs[f"{name} alone"], runs[f"{name} {stage}"]
    assert_close(two, one, rel=1e-3, abs=1e-4)
    weights, others = final_weights(one), final_weights(two)
    assert weights.keys() == others.keys()
    assert all(float((weights[name] - others[name]).abs().max()) < 2e-3 for name in weights)
