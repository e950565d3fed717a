"""slurm/train.sbatch: which exit codes put the job into the queue again, and arrays of seeds."""

import re

import pytest

from tests.cluster.conftest import JOB
from tests.helpers.cluster import wait_until

pytestmark = pytest.mark.slow
RECIPE = """
restart=${SLURM_RESTART_COUNT:-0}
echo "start $restart: $OUTPUT $*"
code=$(cut -d, -f "$((restart + 1))" <<<"$CODES")
[[ $code != *+ ]] || mkdir -p "$OUTPUT/checkpoints/step_1$restart"
exit "${code%+}"
"""
JOBS = {  # exit codes of its recipe, + after a new checkpoint -> exit code of the job, and how often it has started
    "75,138,0": (0, 3),  # --max_hours, then Slurm's notice
    "143,2": (2, 2),  # an error
    "124,143": (143, 2),  # MAX_RESTARTS is 1
    "143+,124,137+,0": (0, 4),  # the same, but it makes progress
    "134,139,1": (1, 3),  # it crashes twice
    "1": (1, 1),
    "130": (130, 1),  # Ctrl-C
}


def test_a_job_starts_again_after_a_stop_or_crash_as_long_as_it_makes_progress(cluster, tmp_path):
    (tmp_path / "recipe.sh").write_text(RECIPE)
    cluster.run("sbatch --test-only slurm/train.sbatch")  # with the lines of the script itself
    jobs = {}
    for codes in JOBS:
        settings = {"RECIPE": f"{tmp_path}/recipe.sh", "MAX_RESTARTS": "1" if "124" in codes else "5", "CODES": codes}
        flags = f"--output={tmp_path}/%j.log slurm/train.sbatch --model_save_path '{tmp_path}/of {codes}'"
        jobs[codes] = cluster.run(f"{JOB} --nodes=1 {flags}", **settings).stdout.strip()
    for codes, (code, starts) in JOBS.items():
        wait_until(lambda job=jobs[codes]: not cluster.run(f"squeue -h -j {job}").stdout, 100, codes)
        log = (tmp_path / f"{jobs[codes]}.log").read_text()
        assert re.findall(r"^start (\d+)", log, re.MULTILINE) == [str(i) for i in range(starts)], codes
        assert f" ExitCode={code}:0" in cluster.run(f"scontrol show job {jobs[codes]}").stdout


def test_each_seed_of_an_array_is_a_job_of_its_own(cluster, tmp_path):
    """The last one, whose number is that of the array, starts again, when the first has ended and the second works."""
    (tmp_path / "recipe.sh").write_text(f"""
echo "start $OUTPUT $*"
[[ $SLURM_ARRAY_TASK_ID != 2 ]] || until [[ -e {tmp_path}/again ]]; do sleep 0.2; done
[[ $SLURM_ARRAY_TASK_ID == 3 ]] || exit 0
[[ -n ${{SLURM_RESTART_COUNT:-}} ]] || exit 143
touch {tmp_path}/again
""")
    settings = {"RECIPE": f"{tmp_path}/recipe.sh", "OUTPUT": f"{tmp_path}/out"}
    command = f"{JOB} --wait --array=1-3 --nodes=1 --output={tmp_path}/seed%a.log slurm/train.sbatch --lr 1"
    cluster.run(command, timeout=100, **settings)
    for seed, starts in ((1, 1), (2, 1), (3, 2)):
        lines = (tmp_path / f"seed{seed}.log").read_text().splitlines()
        assert lines.count(f"start {tmp_path}/out-seed{seed} --seed {seed} --lr 1") == starts
        assert seed == 3 or len(lines) == 1  # Slurm has not ended it
