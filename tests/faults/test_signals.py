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
    "again and again": {"fault": "insistent launcher", "patience": 5},
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


def test_of_two_ranks_one_bears_a_repeated_signal_and_heeds_a_later_one(results):
    """A launcher and a scheduler may pass the same wish on twice; who asks again seconds later means it."""
    result = results["again and again"]
    assert result.codes[1] == 143 and result.codes[0] != 0
    assert result.log.count("SIGTERM\n") == 3
    assert result.log.count("a second signal stops at once") == 1
    assert [path.name for path in (result.out / "checkpoints").iterdir()] == ["step_1"]
