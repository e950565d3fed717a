"""The soak's own checks: what grows is found, what wobbles is not; and a short run is really watched."""

import pytest

from tests.faults.soak import problems, watch


@pytest.mark.parametrize(
    ("grow", "said"),
    [
        ((0, 0, 0, 0), ""),
        ((2.5, 0, 0, 0), "resident memory grew by 1."),  # 6 MB over 2,500 steps
        ((0, 0.01, 0, 0), "descriptors grew from 29 to 52"),
        ((0, 0, 0.001, 0), "threads grew from 11 to 13"),
        ((0, 0, 0, 0.05), "TensorBoard: "),
    ],
)
def test_what_grows_is_found(grow, said):
    """3,000 steps of a run whose numbers wobble, and of which one grows by so much per step."""
    samples = []
    for i in range(3000):
        held = 470e3 + 1e3 * (i % 3) + grow[0] * i, 23 + (i % 3 == 1) + grow[1] * i, 11 + grow[2] * i
        samples.append(tuple(map(int, (*held, 1600 * i + grow[3] * i**2))))
    found = problems(samples)
    assert len(found) == any(grow) and "".join(found).startswith(said)


def test_a_run_is_watched(inputs, tmp_path):
    samples = watch(inputs, tmp_path, steps=12)
    assert len(samples) >= 12 and samples[-1][3] > samples[0][3]
    assert all(memory > 50e3 and descriptors > 3 and threads >= 1 for memory, descriptors, threads, _ in samples)
