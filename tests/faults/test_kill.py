"""Runs that are killed, and runs whose disk (of 64 MiB) is full, go on as if nothing had been."""

import re
import subprocess

import pytest

from tests.faults.kill import KINDS, kill_and_compare
from tests.faults.scenarios import finished, run_cases
from tests.helpers.tiny_run import assert_same_run

STEPS = {"train_steps": 5, "ranks": 1, "zero_stage": 0}


@pytest.mark.parametrize(
    ("kind", "phases"),
    zip(
        KINDS,
        [
            ("scoring", "update", "rollback", "export of final/"),
            ("rollout", "saving", "evaluation", "export of best/"),
        ],
        strict=True,
    ),
)
def test_runs_that_are_killed(inputs, tmp_path, kind, phases):
    """The short form of tests/faults/kill.py."""
    kill_and_compare(inputs, tmp_path, kind, len(phases), seed=1, phases=phases)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs: run it as root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_runs_full(inputs, disk, tmp_path):
    in_save, full = "disk fills in a save", "disk is full"
    undisturbed = finished(run_cases(tmp_path, inputs, {"undisturbed": STEPS}))["undisturbed"]
    result = run_cases(tmp_path, inputs, {in_save: STEPS | {"fault": in_save}}, disk)[in_save]
    finished({in_save: result})
    assert re.search("checkpoint of step 2 was not saved: .*No space left.*older ones are intact", result.log)
    assert re.search("checkpoint of step 3 was not saved: it needs .* MB free", result.log)
    assert sorted(path.name for path in (result.out / "checkpoints").iterdir()) == ["step_1", "step_4", "step_5"]
    assert_same_run(result.out, undisturbed)

    result = run_cases(tmp_path, inputs, {full: STEPS | {"fault": full}}, disk)[full]
    assert result.codes == [2] and "Traceback" not in result.log, result.log[-3000:]
    assert re.search("error: .* cannot be written: No space left on device", result.log)
    (disk / "filler").unlink()
    after = run_cases(tmp_path, inputs, {"after": STEPS | {"out": full}}, disk)
    assert "resuming from" in after["after"].log
    assert_same_run(finished(after)["after"], undisturbed)
