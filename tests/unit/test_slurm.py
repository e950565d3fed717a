"""Rank variables from Slurm's: the values are those that a real Slurm 22.05 sets, or its manual's notation."""

import sys
from subprocess import run

import pytest

from tests.helpers.tiny_run import REPOSITORY, clean_environment
from utils.slurm import PORTS, first_host, rank_variables

THIRD = {  # the last of `srun -N2 -n3`
    "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "n[1-2]",
}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "2"}


def test_a_task_of_several_is_a_rank():
    found = rank_variables(THIRD)
    assert found.pop("MASTER_PORT") == str(15_000 + 101)
    assert found == {
        "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "n1"
    }  # fmt: skip
    nodes = [rank_variables(THIRD | {"SLURM_NODEID": str(i), "SLURM_STEP_TASKS_PER_NODE": "8(x3),4"}) for i in range(4)]
    assert [node["LOCAL_WORLD_SIZE"] for node in nodes] == ["8", "8", "8", "4"]


def test_what_is_no_such_task_stays_as_it_is():
    assert rank_variables({}) == rank_variables(BATCH) == {}
    assert rank_variables(THIRD | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == {}  # srun --pty bash
    assert rank_variables(THIRD | {"RANK": "0"}) == {}  # torchrun in a task
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert rank_variables(THIRD | chosen).items() > chosen.items()


def test_jobs_and_steps_have_ports_of_their_own():
    """Those of consecutive jobs, which may share a node, and of concurrent steps."""
    ports = [
        int(rank_variables(THIRD | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"])
        for job in range(8_000_000, 8_000_016)
        for step in range(10)
    ]
    assert len(set(ports)) == len(ports) and set(ports) <= set(PORTS)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[01-03,7],m2", "n01"),
        ("gpu-a01,gpu-b[1-2]", "gpu-a01"),
        ("gpu-b[9,11-12]", "gpu-b9"),
        ("rack[1-2]n[03-4]", "rack1n03"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_a_command_started_by_srun_is_a_rank_before_it_reads_its_flags():
    command = [sys.executable, "-m", "sft.train", "--lr", "no number"]
    result = run(command, cwd=REPOSITORY, env=clean_environment() | THIRD, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error [rank 2]: --lr"), result.stderr
