"""Settings of the experiments: experiments/settings/NAME.toml, flags of train_ppo.py, each a few away from another.

Every setting starts from base.toml, then from the one that it names as `based_on`. Paths are inside the world's folder
(experiments/world.py).
"""

import hashlib
import json
import tomllib
from functools import cache
from pathlib import Path

from benchmarks.environment import MALLOC
from utils.errors import UserError

REPOSITORY = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "settings"
PATHS = {"policy_model_path": "sft/final", "critic_model_path": "reward/final", "reward_model_path": "reward/final"}
PATHS |= {"data_path": "prompts"}
# One thread a run: two runs share the cores, and the numbers are the same on any count of them.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", **MALLOC}
# All that decides a run's numbers: the toolkit, and what its world is made of.
CODE = ["train_ppo.py", "ppo", "reward", "sft", "data", "utils", "experiments/world.py", "experiments/gold.py"]


def load_flags(name: str) -> dict[str, object]:
    """Flag -> value, everything that the setting is based on included."""
    flags = tomllib.loads(_text(name))
    parent = flags.pop("based_on", "base" if name != "base" else None)
    return (load_flags(parent) if parent else dict(PATHS)) | flags


def command(name: str, seed: int, world: Path, out: Path) -> list[str]:
    """Arguments of train_ppo.py."""
    flags = load_flags(name)
    for flag, value in flags.items():
        if flag.endswith("_path"):
            flags[flag] = world / value
    flags |= {"seed": seed, "model_save_path": out}
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


def run_hash(name: str, seed: int) -> str:
    """Changes with the setting, the seed and the code that runs it; comments and other settings do not count."""
    parts = [json.dumps(load_flags(name), sort_keys=True), str(seed), code_hash()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]


@cache
def code_hash() -> str:
    """Of every Python file that a run is made of."""
    files = [file for name in CODE for file in _python_files(REPOSITORY / name)]
    contents = hashlib.sha256()
    for file in files:
        contents.update(f"{file.relative_to(REPOSITORY)}\n".encode() + file.read_bytes())
    return contents.hexdigest()[:10]


def _python_files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _text(name: str) -> str:
    file = FOLDER / f"{name}.toml"
    if not file.is_file():
        raise UserError(f"no setting {name}: {FOLDER} has {', '.join(sorted(f.stem for f in FOLDER.glob('*.toml')))}")
    return file.read_text("utf-8")
