"""A disk of 64 MiB that runs full: in the middle of a save the run goes on; with no room at all it ends, not lost."""

import re
import subprocess

import pytest

from tests.faults.kill import check_equal
from tests.faults.scenarios import run_cases

STEPS = {"train_steps": 5, "ranks": 1, "zero_stage": 0}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs: run it as root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("whole"), inputs, {"undisturbed": STEPS})["undisturbed"].out


def test_a_disk_that_fills_in_a_save_costs_that_checkpoint_alone(inputs, disk, undisturbed, tmp_path):
    fault = "disk fills in a save"
    result = run_cases(tmp_path, inputs, {fault: STEPS | {"fault": fault}}, disk)[fault]
    assert result.codes == [0], result.log[-3000:]
    assert re.search("the checkpoint of step 2 was not saved: .*No space left.*older ones are intact", result.log)
    assert re.search("the checkpoint of step 3 was not saved: it needs .* MB free", result.log)
    assert sorted(path.name for path in (result.out / "checkpoints").iterdir()) == ["step_1", "step_4", "step_5"]
    check_equal(result.out, undisturbed)


def test_a_run_without_any_room_ends_and_goes_on_when_there_is_some(inputs, disk, undisturbed, tmp_path):
    fault = "disk is full"
    result = run_cases(tmp_path, inputs, {fault: STEPS | {"fault": fault}}, disk)[fault]
    assert result.codes == [2], result.log[-3000:]
    assert "Traceback" not in result.log, result.log[-3000:]
    assert re.search(
        "error: .* cannot be written: No space left on device; free disk space and repeat the same", result.log
    )
    (disk / "filler").unlink()
    after = run_cases(tmp_path, inputs, {"after": STEPS | {"out": fault}}, disk)["after"]
    assert after.codes == [0], after.log[-3000:]
    assert "resuming from" in after.log
    check_equal(result.out, undisturbed)
