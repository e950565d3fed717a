"""The critic on two ranks: offline pre-training and value normalisation give the numbers of one process."""

import importlib
from pathlib import Path

import pytest

from tests.faults.scenarios import finished, run_forked
from tests.helpers.tiny_run import assert_close, final_weights, run_flags

pytestmark = pytest.mark.slow

RUNS = {
    "offline": ("ppo.critic", {"pretrain": True, "critic_pretrain_steps": 3, "value_norm": "popart"}),
    "popart": ("train_ppo", {"value_norm": "popart", "critic_pretrain_steps": 1, "critic_epochs": 2}),
    "running": ("train_ppo", {"value_norm": "running", "critic_updates_per_policy_update": 2}),
}


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> dict[str, Path]:
    """ "NAME STAGE" -> folder of a run on two ranks; "NAME alone": of one process."""
    folder, rows = tmp_path_factory.mktemp("critics"), {}
    for name, (module, flags) in RUNS.items():
        importlib.import_module(module).main(run_flags(inputs, folder / f"{name} alone", **flags))
        for stage in (2, 3):
            argv = run_flags(inputs, folder / f"{name} {stage}", zero_stage=stage, **flags)
            rows[f"{name} {stage}"] = {"module": module, "argv": argv}
    return finished(run_forked(folder, rows)) | {f"{name} alone": folder / f"{name} alone" for name in RUNS}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_process(runs, name, stage):
    one, two = runs[f"{name} alone"], runs[f"{name} {stage}"]
    assert_close(two, one, rel=1e-3, abs=1e-4)
    weights, others = final_weights(one), final_weights(two)
    assert weights.keys() == others.keys()
    assert all(float((weights[name] - others[name]).abs().max()) < 2e-3 for name in weights)
