"""Jobs that are told to stop, or lose a node, go on and end as an undisturbed run, bit for bit."""

import re

import pytest

from tests.cluster.conftest import JOB, STEPS, Run
from tests.helpers.cluster import wait_until
from tests.helpers.tiny_run import assert_same_run

pytestmark = pytest.mark.slow
HANG = 30  # seconds of --hang_timeout; on a busy machine, importing packages alone may take 20


def submit(run: Run, **flags) -> str:
    """Submits slurm/train.sbatch for two nodes. Returns the number of the job."""
    command = f"{JOB} --output={run.log} slurm/train.sbatch {run.flags(**flags)}"
    return run.cluster.run(command, **run.settings()).stdout.strip()


def shown(run: Run, job: str, key: str) -> str:
    """What `scontrol show job` says."""
    return re.search(rf"\b{key}=(\S+)", run.cluster.run(f"scontrol show job {job}").stdout)[1]


def wait_for(run: Run, job: str, key: str, value: str) -> None:
    wait_until(lambda: shown(run, job, key) == value, 300, f"{key}={value}: {run.log.read_text()[-3000:]}")


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


def kill_second_node(run: Run, steps: int) -> None:
    """Takes the power of n2 when the run is in the step after these. The other node's rank is left waiting for it."""
    run.wait_until_held(steps)
    run.cluster.kill_node("n2")
    run.hold(STEPS)


def test_a_job_goes_on_when_a_node_that_has_died_is_back(new_run, expected):
    run = new_run("job")
    run.hold(3)
    job = submit(run, checkpoint_per_step=2, hang_timeout=HANG)
    kill_second_node(run, 3)
    wait_for(run, job, "Restarts", "1")
    run.cluster.start_node("n2")
    wait_for(run, job, "JobState", "COMPLETED")
    assert_same_run(run.out, expected.out)


@pytest.mark.parametrize(("launcher", "is_back"), [("own", False), ("deepspeed", True)])
def test_a_machine_that_dies_ends_the_others_and_the_same_command_goes_on(new_run, expected, launcher, is_back):
    """is_back: it starts again at once, so that connections are refused; else nothing is heard from it."""
    run = new_run(launcher)
    hosts = run.folder / "hosts"
    hosts.write_text("n1 slots=1\nn2 slots=1\n")
    settings = run.settings(HOSTFILE=str(hosts), NUM_GPUS="1", LAUNCHER=launcher)
    command = f"bash run_en.sh {run.flags(checkpoint_per_step=2, hang_timeout=HANG)}"
    run.hold(3)
    first = run.cluster.start(command, run.log, "n1", **settings)
    kill_second_node(run, 3)
    if is_back:
        run.cluster.start_node("n2")
    try:
        assert first.wait(HANG + 60) != 0  # DeepSpeed's launcher and ours look every 15 s whether a machine is there
    finally:
        if not is_back:
            run.cluster.start_node("n2")
    log = run.log.read_text()
    assert is_back or f"no progress for {HANG} s (--hang_timeout)" in log, log
    assert run.cluster.start(command, run.log, "n1", **settings).wait(240) == 0, run.log.read_text()
    assert_same_run(run.out, expected.out)
