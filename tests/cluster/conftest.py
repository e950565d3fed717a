"""A cluster for the tests of this folder, or the reason why there is none; and tiny runs of PPO with two ranks.

The runs are those of run_en.sh, of one rank per node. Their reward function writes the environment of its rank to a file.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.cluster import Cluster, what_is_missing
from tests.helpers.tiny_run import REPOSITORY, Inputs, clean_environment, read_lines, run_flags

REWARD = """
import json, os, pathlib, socket, time
folder = pathlib.Path(__file__).parent

def vowels(prompts, answers):
    seen = dict(os.environ) | {"host": socket.gethostname(), "threads": len(os.sched_getaffinity(0))}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
    if (folder / "slow").exists():
        time.sleep(0.7)
    return [sum(letter in "aeiou" for letter in answer) / (1 + len(answer)) for answer in answers]
"""
STEPS = 8


@dataclass
class Run:
    """One run: `name` is unique. folder: of the reward function and what it writes; out: of the run; log: of the job."""

    cluster: Cluster
    inputs: Inputs
    folder: Path

    def __post_init__(self):
        self.folder.mkdir()
        (self.folder / "reward.py").write_text(REWARD)
        self.out, self.log = self.folder / "out", self.folder / "log"

    def flags(self, **changes) -> str:
        """The flags of train_ppo.py, as words of a shell."""
        own = {"reward_fn": f"{self.folder}/reward.py:vowels", "train_steps": STEPS, "num_eval_prompts": 0}
        return shlex.join(run_flags(self.inputs, self.out, **own | {"hang_timeout": 20} | changes))

    def settings(self, **changes: str) -> dict[str, str]:
        """Environment of run_en.sh."""
        paths = {"POLICY_MODEL": self.inputs.policy, "CRITIC_MODEL": self.inputs.reward, "DATA": self.inputs.prompts}
        own = {name: str(path) for name, path in (paths | {"OUTPUT": self.out}).items()}
        path = f"{Path(sys.executable).parent}:{clean_environment()['PATH']}"
        cpu = {"DS_ACCELERATOR": "cpu", "VIRTUAL_ENV": sys.prefix, "PATH": path}
        return clean_environment() | own | cpu | changes

    def slow(self, is_slow: bool = True) -> None:
        """From now on each step takes 0.7 s longer, or no longer."""
        (self.folder / "slow").touch() if is_slow else (self.folder / "slow").unlink(missing_ok=True)

    def steps(self) -> int:
        """How many steps are in metrics.jsonl."""
        file = self.out / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def environment(self, rank: int) -> dict:
        """What a rank has seen in its last step."""
        return json.loads((self.folder / f"rank{rank}.json").read_text())


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes, n1 and n2, with Slurm and sshd."""
    if missing := what_is_missing():
        pytest.skip(missing)
    with Cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="session")
def new_run(cluster, inputs, tmp_path_factory):
    """Name -> a run that is still to be started."""
    folder = tmp_path_factory.mktemp("runs")
    return lambda name: Run(cluster, inputs, folder / name)


@pytest.fixture(scope="session")
def expected(new_run) -> Run:
    """The undisturbed run, two ranks of one node, started by utils/launcher.py."""
    run = new_run("expected")
    result = run.cluster.run(f"bash run_en.sh {run.flags()}", "n1", check=False, **run.settings(NUM_GPUS="2"))
    assert result.returncode == 0, result.stdout + result.stderr
    return run
