"""A cluster for the tests of this folder, or the reason why there is none; and tiny runs of PPO on two ranks."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.cluster import Cluster, wait_until, what_is_missing
from tests.helpers.tiny_run import Inputs, clean_environment, run_flags

# Writes the environment of its rank to a file; waits in step N + 1 as long as the file `hold` contains N.
REWARD = """
import json, os, pathlib, socket, time
folder = pathlib.Path(__file__).parent
metrics, hold = folder / "out" / "metrics.jsonl", folder / "hold"

def vowels(prompts, answers):
    seen = dict(os.environ) | {"host": socket.gethostname()}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
    done = metrics.read_text().count("\\n") if metrics.exists() else 0
    while hold.exists() and hold.read_text() == str(done):
        (folder / "held").write_text(str(done))
        time.sleep(0.1)
    return [sum(letter in "aeiou" for letter in answer) / (1 + len(answer)) for answer in answers]
"""
STEPS = 8
JOB = "sbatch --parsable -N2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0"


@dataclass
class Run:
    """A run. folder: of its reward function, and what that writes; out: what the run writes; log: what it prints."""

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
        return shlex.join(run_flags(self.inputs, self.out, **own | {"hang_timeout": 100} | changes))

    def settings(self, **changes: str) -> dict[str, str]:
        """Environment of run_en.sh."""
        paths = {"POLICY_MODEL": self.inputs.policy, "CRITIC_MODEL": self.inputs.reward, "DATA": self.inputs.prompts}
        own = {name: str(path) for name, path in (paths | {"OUTPUT": self.out}).items()}
        path = f"{Path(sys.executable).parent}:{clean_environment()['PATH']}"
        cpu = {"DS_ACCELERATOR": "cpu", "VIRTUAL_ENV": sys.prefix, "PATH": path}
        return clean_environment() | own | cpu | changes

    def hold(self, steps: int) -> None:
        """The run will wait, or goes on and waits, in the middle of the step after that many."""
        (self.folder / "hold.new").write_text(str(steps))
        (self.folder / "hold.new").rename(self.folder / "hold")

    def wait_until_held(self, steps: int) -> None:
        """Returns when the run waits there."""
        held = self.folder / "held"
        wait_until(lambda: held.exists() and held.read_text() == str(steps), 120, f"step {steps}: {self.log}")

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
