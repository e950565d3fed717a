"""The soak's own checks: what grows is found, what wobbles is not; and a short run is really watched."""

import pytest

from tests.faults.soak import FLAGS, Sample, problems, watch
from tests.helpers.tiny_run import run_flags


def samples(memory=0.0, descriptors=0.0, threads=0.0, board=0.0) -> list[Sample]:
    """3,000 steps of a run whose numbers wobble, and of which some grow by so much per step."""
    rows = []
    for step in range(10, 3001, 10):
        wobble = step // 10 % 3
        held = 470e6 + 1e6 * wobble + memory * step, 23 + (wobble == 1) + descriptors * step, 11 + threads * step
        rows.append(Sample(step, *map(int, held), int(1600 * step + board * step**2)))
    return rows


@pytest.mark.parametrize(
    ("grow", "said"),
    [
        ({}, ""),
        ({"memory": 2500}, "resident memory grew by 1."),  # 6 MB over 2,500 steps
        ({"descriptors": 0.01}, "descriptors grew from 29 to 52"),
        ({"threads": 0.001}, "threads grew from 11 to 13"),
        ({"board": 0.05}, "TensorBoard: "),
    ],
)
def test_what_grows_is_found(grow, said):
    found = problems(samples(**grow), 3000)
    assert len(found) == bool(grow) and "".join(found).startswith(said)


def test_a_run_is_watched(inputs, tmp_path):
    out = tmp_path / "run"
    found = watch(run_flags(inputs, out, **FLAGS | {"train_steps": 12}), out, tmp_path / "log", every=2)
    assert len(found) >= 2
    assert found[-1].step <= 12 and found[-1].board > found[0].board
    assert all(s.memory > 50e6 and s.descriptors > 3 and s.threads >= 1 for s in found)
