"""Rank variables of a task that `srun` has started, from Slurm's own variables."""

import re
from collections.abc import Mapping

PORTS = range(15_000, 32_000)  # of process groups; below the ports of outgoing connections


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns RANK, WORLD_SIZE and so on for one of several tasks of a Slurm step; nothing for any other process.

    Nothing, too, if RANK is set: a launcher or the user has chosen. MASTER_ADDR and MASTER_PORT are kept if set.
    The port follows from job and step, so that tasks agree without a message and two jobs can share a node.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")  # of srun; the shells of sbatch and salloc do not have it
    if tasks == "1" or "RANK" in environ:
        return {}
    counts = [
        count
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"])  # "8(x3),4"
        for _ in range(int(times or 1))
    ]
    place = 101 * int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": counts[int(environ["SLURM_NODEID"])],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(PORTS[place % len(PORTS)]),
    }


def first_host(nodes: str) -> str:
    """Returns the first name of a list in Slurm's notation: "n[01-03,7],m2" gives "n01"."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.match(r"(\[[^]]*\]|[^,[])+", nodes)[0])
