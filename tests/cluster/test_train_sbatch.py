"""slurm/train.sbatch: which exit codes put the job into the queue again, and arrays of seeds."""

import re

import pytest

from tests.cluster.conftest import JOB
from tests.helpers.cluster import wait_until

pytestmark = pytest.mark.slow
RECIPE = """
echo "start ${SLURM_RESTART_COUNT:-0}: $OUTPUT $*"
exit "$(cut -d, -f "$((${SLURM_RESTART_COUNT:-0} + 1))" <<<"$CODES")"
"""
JOBS = {  # exit codes of its recipe -> exit code of the job, and how often it has started
    "75,138,0": (0, 3),  # --max_hours, then Slurm's notice
    "143,2": (2, 2),  # an error
    "143,143,0": (143, 2),  # where MAX_RESTARTS is 1
    "124,137,1": (1, 3),  # it hangs, then a process is killed
    "1": (1, 1),
    "130": (130, 1),  # Ctrl-C
}


def test_a_job_starts_again_after_a_stop_and_not_after_an_error(cluster, tmp_path):
    (tmp_path / "recipe.sh").write_text(RECIPE)
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    settings = {"RECIPE": f"{tmp_path}/recipe.sh", "OUTPUT": f"{tmp_path}/out"}
    cluster.run("sbatch --test-only slurm/train.sbatch")  # with the lines of the script itself
    jobs = {}
    for codes in JOBS:
        limit = {"MAX_RESTARTS": "1"} if codes == "143,143,0" else {}
        command = f"{JOB} --nodes=1 --output={tmp_path}/%j.log slurm/train.sbatch --lr 1"
        jobs[codes] = cluster.run(command, CODES=codes, **settings, **limit).stdout.strip()
    command = f"{JOB} --wait --array=1-2 --nodes=1 --output={tmp_path}/seed%a.log slurm/train.sbatch --lr 1"
    cluster.run(command, CODES="0", **settings)
    for seed in (1, 2):
        log = (tmp_path / f"seed{seed}.log").read_text()
        assert log == f"start 0: {tmp_path}/out-seed{seed} --seed {seed} --lr 1\n"
    for codes, (code, starts) in JOBS.items():
        wait_until(lambda job=jobs[codes]: not cluster.run(f"squeue -h -j {job}").stdout, 100, codes)
        log = (tmp_path / f"{jobs[codes]}.log").read_text()
        assert re.findall(r"^start (\d+)", log, re.MULTILINE) == [str(i) for i in range(starts)], codes
        assert f" ExitCode={code}:0" in cluster.run(f"scontrol show job {jobs[codes]}").stdout
