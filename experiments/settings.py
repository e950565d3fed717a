"""Settings of the experiments: flags of train_ppo.py in experiments/settings/NAME.toml.

Each setting changes some flags of the setting named by `based_on`, or of base.toml. NAME@FLAG=VALUE is NAME with
another value of a flag, NAME@OTHER is NAME with the flags in OTHER's own file. Paths are relative to the world's folder
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
# One thread per run: several runs share the cores, and results do not depend on the number of cores.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", **MALLOC}
# The code that determines a run's results.
CODE = ["train_ppo.py", "ppo", "reward", "sft", "data", "utils", "experiments/world.py", "experiments/gold.py"]
CODE += ["experiments/long_reward.py"]


def load_flags(name: str) -> dict[str, object]:
    """Returns flag -> value, with the flags of the setting that it is based on."""
    name, *changes = name.split("@")
    flags = _load_file(name)
    for change in changes:
        more = tomllib.loads(change) if "=" in change else _read(change)
        flags |= {flag: value for flag, value in more.items() if flag != "based_on"}
    return {flag: value for flag, value in flags.items() if value != ""}  # "" takes a flag of the parent away


def _load_file(name: str) -> dict[str, object]:
    flags = _read(name)
    parent = flags.pop("based_on", "base" if name != "base" else None)
    return (_load_file(parent) if parent else dict(PATHS)) | flags


def _read(name: str) -> dict[str, object]:
    file = FOLDER / f"{name}.toml"
    if not file.is_file():
        settings = ", ".join(sorted(f.stem for f in FOLDER.glob("*.toml")))
        raise UserError(f"no setting {name} in {FOLDER}; use {settings}")
    return tomllib.loads(file.read_text("utf-8"))


def command(name: str, seed: int, world: Path, out: Path) -> list[str]:
    """Returns the command-line arguments of train_ppo.py."""
    flags = load_flags(name)
    for flag, value in flags.items():
        if flag.endswith("_path"):
            flags[flag] = world / value
    flags |= {"seed": seed, "model_save_path": out}
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


def run_hash(name: str, seed: int) -> str:
    """Returns a hash of the setting's flags, the seed and the code."""
    parts = [json.dumps(load_flags(name), sort_keys=True), str(seed), code_hash()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]


@cache
def code_hash() -> str:
    """Returns a hash of all Python files in CODE."""
    contents = hashlib.sha256()
    for path in (REPOSITORY / name for name in CODE):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            contents.update(f"{file.relative_to(REPOSITORY)}\n".encode() + file.read_bytes())
    return contents.hexdigest()[:10]
