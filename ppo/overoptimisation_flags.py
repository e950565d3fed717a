"""Flags of `python -m ppo.compare --checkpoints RUN`, most of which come from the run's config.json. No torch."""

import os
from dataclasses import dataclass, field, fields
from typing import ClassVar

from ppo.flags.sampling import DecodingFlags, LengthFlags
from ppo.reward_fn_flags import RewardFunctionFlags
from reward.scoring.flags import RewardFlags
from utils.errors import UserError
from utils.files import read_json
from utils.flags.checks import SEEDS, check_range
from utils.flags.data import RecordFlags
from utils.flags.fields import Common
from utils.flags.parser import parse_args, read_values

COLUMNS = ("proxy", "kl", "length")  # of the scores, in which held-out ones have their paths as names


@dataclass
class CheckpointsConfig(LengthFlags, DecodingFlags, RewardFunctionFlags, RewardFlags, RecordFlags):
    """Score every kept policy of a PPO run by its own reward model and by held-out ones.

    Flags that are not given have the values of the run, those of --reward_fn excepted: its files are run.
    """

    required = ("checkpoints",)
    hang_timeout = 0.0  # no flag: there is one process
    reward_flag: ClassVar[str] = "--reward_model_path"  # an attribute, since the held-out models have another one

    checkpoints: Common[str] = ""
    """Folder of a PPO run. Scored: its first policy, checkpoints/ (see --keep_checkpoints), best/ and final/"""
    heldout_reward_model_path: Common[list[str]] = field(default_factory=list)
    """Reward model that the run has not been trained on, or several: folders or hub ids"""
    heldout_reward_fn: Common[list[str]] = field(default_factory=list)
    """Function that the run has not been trained on, or several: file.py:name, as --reward_fn. THE FILES ARE RUN"""
    policy_model_path: str = ""
    """Policy that the run began with"""
    data_path: Common[list[str]] = field(default_factory=list)
    """Prompts: the *valid* files of a folder, or all of them if it has none. Default: those that the run held out"""
    output: Common[str | None] = None
    """JSON file for all numbers; the picture is written beside it, as .png"""
    num_prompts: Common[int] = 256
    """Number of prompts"""
    seed: Common[int] = 42
    """Seed of the answers and of the intervals"""
    temperature: float = 1.0
    """Sampling temperature, at which the KL is measured as well"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of the policies. Default: that of the first one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, num_prompts=(2, None), seed=SEEDS, temperature=(1e-3, None))
        if not self.heldout_reward_model_path and not self.heldout_reward_fn:
            what = "nothing that the run was not trained on scores the answers"
            raise UserError(f"{what}: pass --heldout_reward_model_path or --heldout_reward_fn")
        if self.output and self.output.lower().endswith(".png"):
            raise UserError(
                f"--output {self.output} is for the JSON file; pass a name in .json: the picture lies beside it"
            )
        trained = {_place(value) for value in self.reward_paths + self.reward_fn}
        for flag in ("heldout_reward_model_path", "heldout_reward_fn"):
            values = getattr(self, flag)
            places = [_place(value) for value in values]
            for value, place in zip(values, places, strict=True):
                if place in trained:
                    raise UserError(f"--{flag} {value}: the run was trained on it; pass another one")
                if places.count(place) > 1:
                    raise UserError(f"--{flag} contains {value} twice: pass it once")
        self.heldout_reward_model_path = [
            f"./{path}" if path in COLUMNS else path for path in self.heldout_reward_model_path
        ]


def read_flags(argv: list[str]) -> tuple[CheckpointsConfig, dict]:
    """Returns (flags, content of the run's config.json). Raises UserError."""
    given, chosen = read_values(CheckpointsConfig, argv)  # unchecked: the checks need the run's values as well
    run = given.get("checkpoints") or parse_args(CheckpointsConfig, argv).checkpoints
    file = os.path.join(run, "config.json")
    if not os.path.isfile(file):
        raise UserError(f"--checkpoints {run}: no config.json there; pass the folder of a PPO run")
    saved = read_json(file, "--checkpoints")
    if not saved.get("policy_model_path"):
        raise UserError(f"--checkpoints: {file} names no policy_model_path; pass the folder of a PPO run")
    scores = {"reward_model_path": saved.get("reward_model_path") or saved.get("critic_model_path")}
    words = _words(saved | ({} if saved.get("reward_fn") else scores), chosen)
    return parse_args(CheckpointsConfig, [*words, *_weights(saved, given), *argv]), saved


def _weights(saved: dict, given: dict) -> list[str]:
    """Returns --reward_fn_weights of a run if its functions are given. Raises UserError if nothing scores as it did."""
    functions, weights = (_texts(saved.get(name)) for name in ("reward_fn", "reward_fn_weights"))
    flag = ["--reward_fn_weights", *weights] if weights else []
    asked = " ".join(["--reward_fn", *functions, *flag])
    if functions and not given.get("reward_model_path") and not given.get("reward_fn"):
        raise UserError(f"--checkpoints: the run's score is that of {asked}; pass it, if it may be run")
    if not flag or not given.get("reward_fn") or "reward_fn_weights" in given:
        return []
    if [*map(_place, given["reward_fn"])] != [*map(_place, functions)]:
        raise UserError(f"--checkpoints: the run's score is that of {asked}; pass --reward_fn_weights as well")
    return flag


def _texts(value) -> list[str]:
    return [*map(str, value)] if isinstance(value, list) else [str(value)] if value else []


def _place(value: str) -> str:
    """Returns one name for all paths of a model's folder, or of a function as file.py:name."""
    file, colon, name = value.rpartition(":")
    return os.path.realpath(file) + colon + name if colon else os.path.realpath(value)


def _words(saved: dict, given: frozenset[str]) -> list[str]:
    """Returns the flags of a run, without those that are given, as on the command line."""
    own = {"seed", "reward_fn", "reward_fn_weights", "reward_fn_timeout"}
    words = []
    for name in sorted({x.name for x in fields(CheckpointsConfig)} - own - given):
        if saved.get(name) not in (None, "", []):
            value = saved[name]
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return words
