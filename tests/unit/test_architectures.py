"""The short form of `python -m tests.architectures`: the families that people use most are right in every stage."""

import pytest

from tests.architectures.configs import SHORT
from tests.architectures.outcome import check_family


@pytest.mark.parametrize("name", SHORT)
def test_family_equals_its_plain_forward_in_every_stage(name, tmp_path, single_process):
    outcome = check_family(name, tmp_path)

    assert outcome.kind == "equal", outcome
