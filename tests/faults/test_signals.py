"""A scheduler's notice: one rank that hears it is enough, and a second one is heeded at once."""

import json

import pytest

from tests.faults.kill import check_equal
from tests.faults.scenarios import run_cases

CASES = {
    "undisturbed": {},
    "one rank": {"fault": "SIGTERM in scoring"},
    "after one rank": {"out": "one rank"},
    "twice": {"fault": "two signals", "ranks": 1},
}


@pytest.fixture(scope="module")
def results(inputs, tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("signals"), inputs, CASES)


def test_a_signal_to_one_rank_stops_both_after_the_step(results):
    result = results["one rank"]
    assert result.codes == [143, 143]
    assert "stopped by SIGTERM after step 1; the same command goes on" in result.log
    assert results["after one rank"].codes == [0, 0]
    assert json.loads((result.out / "config.json").read_text())["resumed_from_step"] == 1
    check_equal(result.out, results["undisturbed"].out)


def test_a_second_signal_ends_a_process_in_the_middle_of_its_step(results):
    result = results["twice"]
    assert result.codes == [-15]
    assert [path.name for path in (result.out / "checkpoints").iterdir()] == ["step_1"]
