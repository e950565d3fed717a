"""Groups on two ranks: the numbers of one process, whatever the estimator, whatever is dropped and sampled again."""

from pathlib import Path

import pytest

from tests.helpers.tiny_run import assert_close, read_lines
from tests.helpers.two_ranks import alone_and_on_two_ranks

ESTIMATORS = {
    "grpo": {"drop_uniform_groups": True, "max_refills": 2, "loss_average": "group"},
    "remax": {"loss_average": "sequence"},
    "length_adaptive_gae": {},
}


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> dict[str, Path]:
    """As of `alone_and_on_two_ranks`."""
    groups = {"num_responses_per_prompt": 2}
    runs = {name: ("train_ppo", groups | flags | {"advantage_estimator": name}) for name, flags in ESTIMATORS.items()}
    return alone_and_on_two_ranks(inputs, tmp_path_factory.mktemp("groups"), runs)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_ranks_equal_one_process(runs, name, stage):
    one, two = runs[f"{name} alone"], runs[f"{name} {stage}"]
    assert_close(two, one, rel=1e-4, abs=1e-5)
    answers = [[row["answer"] for row in read_lines(run / "samples.jsonl")] for run in (one, two)]
    assert answers[0] == answers[1]
