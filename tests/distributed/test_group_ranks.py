"""Groups on two ranks: the numbers of one process, whatever the estimator, whatever is dropped and sampled again."""

import importlib
from pathlib import Path

import pytest

from tests.faults.scenarios import finished, run_forked
from tests.helpers.tiny_run import assert_close, read_lines, run_flags

ESTIMATORS = {
    "grpo": {"drop_uniform_groups": True, "max_refills": 2, "loss_average": "group"},
    "remax": {"loss_average": "sequence"},
    "length_adaptive_gae": {},
}


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> dict[str, Path]:
    """ "NAME STAGE" -> folder of a run on two ranks; "NAME alone": of one process."""
    folder, rows = tmp_path_factory.mktemp("groups"), {}
    for name, flags in ESTIMATORS.items():
        flags = flags | {"advantage_estimator": name, "num_responses_per_prompt": 2}
        importlib.import_module("train_ppo").main(run_flags(inputs, folder / f"{name} alone", **flags))
        for stage in (2, 3):
            argv = run_flags(inputs, folder / f"{name} {stage}", zero_stage=stage, **flags)
            rows[f"{name} {stage}"] = {"module": "train_ppo", "argv": argv}
    return finished(run_forked(folder, rows)) | {f"{name} alone": folder / f"{name} alone" for name in ESTIMATORS}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_ranks_equal_one_process(runs, name, stage):
    one, two = runs[f"{name} alone"], runs[f"{name} {stage}"]
    assert_close(two, one, rel=1e-4, abs=1e-5)
    answers = [[row["answer"] for row in read_lines(run / "samples.jsonl")] for run in (one, two)]
    assert answers[0] == answers[1]
