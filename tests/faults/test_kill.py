"""The short form of tests/faults/kill.py."""

import pytest

from tests.faults.kill import KINDS, kill_and_compare


@pytest.mark.parametrize("kind", KINDS)
def test_runs_that_are_killed_end_as_if_they_had_not_been(inputs, tmp_path, kind):
    kill_and_compare(inputs, tmp_path, kind, kills=4, seed=1)
