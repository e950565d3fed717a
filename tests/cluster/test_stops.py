"""Jobs that are told to stop, or lose a node, go on and end as an undisturbed run, bit for bit."""

import re

import pytest

from tests.cluster.conftest import JOB, STEPS, Run
from tests.helpers.cluster import wait_until
from tests.helpers.tiny_run import assert_same_run

pytestmark = pytest.mark.slow


def submit(run: Run, **flags) -> str:
    """Submits slurm/train.sbatch for two nodes. Returns the number of the job."""
    command = f"{JOB} --output={run.log} slurm/train.sbatch {run.flags(**flags)}"
    return run.cluster.run(command, **run.settings()).stdout.strip()


def shown(run: Run, job: str, key: str) -> str:
    """What `scontrol show job` says."""
    return re.search(rf"\b{key}=(\S+)", run.cluster.run(f"scontrol show job {job}").stdout)[1]


def wait_for(run: Run, job: str, key: str, value: str) -> None:
    wait_until(lambda: shown(run, job, key) == value, 150, f"{key}={value}: {run.log.read_text()[-3000:]}")


def notice(run: Run, job: str) -> None:
    run.cluster.run(f"scancel --signal=TERM {job}")


def preemption(run: Run, job: str) -> None:
    run.cluster.run("srun -p high -N1 --exclusive true")


def time_limit(run: Run, job: str) -> None:
    """Less is left than the time of the job's --signal. Slurm looks at it every 30 seconds."""
    run.cluster.run(f"scontrol update JobId={job} TimeLimit=10")


STOPS = {1: notice, 3: preemption, 5: time_limit}  # after so many steps


def test_a_job_that_is_told_to_stop_loses_only_the_step_at_hand(new_run, expected):
    run = new_run("stops")
    run.hold(min(STOPS))
    job = submit(run, checkpoint_per_step=100)  # none but those of the stops
    for restarts, (steps, stop) in enumerate(STOPS.items()):
        run.wait_until_held(steps)
        stop(run, job)
        wait_for(run, job, "Restarts", str(restarts + 1))
        run.cluster.run(f"scontrol update JobId={job} TimeLimit=UNLIMITED")
        run.hold(next((later for later in STOPS if later > steps), STEPS))
    wait_for(run, job, "JobState", "COMPLETED")
    assert_same_run(run.out, expected.out)
    made = re.findall(rf"^step (\d+)/{STEPS}: ", run.log.read_text(), re.MULTILINE)
    assert made == [str(step) for step in range(1, STEPS + 1)]  # none of them twice
