"""Two nodes of one rank each make the numbers of two ranks of one node, whatever starts them."""

import re
import time
from functools import partial

import pytest

from tests.cluster.conftest import JOB, Run
from tests.helpers.cluster import NODES
from tests.helpers.tiny_run import assert_same_run

pytestmark = pytest.mark.slow
LIMIT = 240  # seconds for a run
SETTINGS = {"HF_TEST": "a  'b' \"c\" $d `e`", "WANDB_TEST": "1", "NCCL_TEST": "x", "TOKENIZERS_PARALLELISM": "false"}


def srun(run: Run) -> int:
    command = f"srun -N2 -n2 python train_ppo.py {run.flags()}"
    return run.cluster.start(command, run.log, **run.settings(**SETTINGS)).wait(LIMIT)


def job(run: Run, **changes: str) -> int:
    command = f"{JOB} --wait --output={run.log} slurm/train.sbatch {run.flags()}"
    settings = run.settings(**SETTINGS | changes)
    return run.cluster.run(command, check=False, timeout=LIMIT, **settings).returncode


def hostfile(run: Run, launcher: str = "auto") -> int:
    hosts = run.folder / "hosts"
    hosts.write_text("n1 slots=1\nn2 slots=1\n")
    settings = run.settings(HOSTFILE=str(hosts), NUM_GPUS="1", LAUNCHER=launcher, **SETTINGS)
    return run.cluster.start(f"bash run_en.sh {run.flags()}", run.log, "n1", **settings).wait(LIMIT)


def torchrun(run: Run) -> int:
    """The recipe, on each node."""
    settings = run.settings(LAUNCHER="torchrun", NUM_GPUS="1", NNODES="2", MASTER_ADDR="n1", **SETTINGS)
    agents = [
        run.cluster.start(
            f"bash run_en.sh {run.flags()}", run.folder / f"log.{node}", node, NODE_RANK=str(i), **settings
        )
        for i, node in enumerate(NODES)
    ]
    return max(agent.wait(LIMIT) for agent in agents)


LAUNCHERS = {
    "srun": srun,
    "sbatch": job,
    "containers": partial(job, WRAPPER="srun --kill-on-bad-exit=0 --wait=60 env"),  # env, for want of a container
    "ssh": hostfile,
    "pdsh": partial(hostfile, launcher="deepspeed"),
    "torchrun": torchrun,
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_nodes_make_the_numbers_of_one(new_run, expected, name):
    """The second node has the variables of the first, too."""
    run = new_run(name)
    code = LAUNCHERS[name](run)
    assert code == 0, "".join(log.read_text() for log in run.folder.glob("log*"))
    assert_same_run(run.out, expected.out)
    seen = [run.environment(rank) for rank in (0, 1)]
    assert [each["host"] for each in seen] == list(NODES)
    for name in (*SETTINGS, "OMP_NUM_THREADS"):
        assert seen[0][name] == seen[1][name] == run.settings(**SETTINGS)[name]


ALLOCATIONS = {  # flags of salloc -> GPUs of each process that count_gpus starts with
    "--ntasks-per-node=2": 0,
    "--gres=gpu:8": 8,
    "--gpus-per-node=4": 4,
    "--gpus=16": 8,
    "--gpus=10": 2,  # of the node with the fewest
    "--gpus-per-task=1 --ntasks-per-node=4": 1,
    "--gres=gpu:2 --exclusive": 2,
}


def test_the_shell_of_an_allocation_has_the_gpus_of_its_nodes(cluster):
    """This one runs on the head, which has none. Slurm tells it of --gpus-per-node only."""
    script = "set -euo pipefail; source utils/launch.sh; NUM_GPUS=$(count_gpus); echo $NUM_GPUS"
    for flags, count in ALLOCATIONS.items():
        shell = cluster.run(f"env -u CUDA_VISIBLE_DEVICES salloc -Q -N2 {flags} bash -c '{script}'")
        assert (shell.stdout, shell.stderr) == (f"{count}\n", ""), flags


@pytest.mark.parametrize("name", ["sbatch", "ssh", "torchrun"])
def test_a_node_without_the_model_ends_all_with_one_line(new_run, name):
    """The job does not try again. torchrun has a traceback of its own, and turns the code into 1."""
    run = new_run(f"no model for {name}".replace(" ", "_"))
    run.cluster.run(f"mount -t tmpfs none {run.inputs.policy}", "n2")
    begin = time.monotonic()
    try:
        code = LAUNCHERS[name](run)
    finally:
        run.cluster.run(f"umount {run.inputs.policy}", "n2")
    log = "".join(log.read_text() for log in run.folder.glob("log*"))
    assert code == (1 if name == "torchrun" else 2), log
    assert time.monotonic() - begin < 100  # a minute of which may be the start of Python on a busy machine
    (line,) = set(re.findall(r"^error \[rank \d\]: (.*)", log, re.MULTILINE))
    assert "rank 1" in line and "--policy_model_path" in line
    assert ("Traceback" in log) == (name == "torchrun")
    assert not (run.out / "metrics.jsonl").exists() and "queue" not in log
