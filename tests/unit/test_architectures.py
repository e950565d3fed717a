"""The matrix of `python -m tests.architectures`: the families that people use most are right, and none is wrong."""

import pytest

from tests.architectures.configs import FAMILIES, SHORT, VARIANTS
from tests.architectures.outcome import check_family


@pytest.mark.parametrize("name", SHORT)
def test_family_equals_its_plain_forward_in_every_stage(name, tmp_path, single_process):
    outcome = check_family(name, tmp_path)

    assert outcome.kind == "equal", outcome


@pytest.mark.slow
def test_every_other_family_is_right_or_refused(tmp_path, single_process):
    outcomes = [check_family(name, tmp_path) for name in (*FAMILIES, *VARIANTS) if name not in SHORT]

    assert [outcome for outcome in outcomes if outcome.kind == "wrong"] == []
    assert sum(outcome.kind in ("equal", "refused") for outcome in outcomes) >= 70
