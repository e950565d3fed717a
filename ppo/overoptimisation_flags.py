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
from utils.flags.parser import parse_args

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
        check_range(self, num_prompts=(1, None), seed=SEEDS, temperature=(1e-3, None))
        if not self.heldout_reward_model_path and not self.heldout_reward_fn:
            what = "nothing that the run was not trained on scores the answers"
            raise UserError(f"{what}: pass --heldout_reward_model_path or --heldout_reward_fn")
        for flag in ("heldout_reward_model_path", "heldout_reward_fn"):
            values = getattr(self, flag)
            if trained := {*values} & {*self.reward_paths, *self.reward_fn}:
                raise UserError(f"--{flag} {min(trained)}: the run was trained on it; pass another one")
            if twice := [value for value in values if values.count(value) > 1]:
                raise UserError(f"--{flag} contains {twice[0]} twice: pass it once")
        self.heldout_reward_model_path = [
            f"./{path}" if path in COLUMNS else path for path in self.heldout_reward_model_path
        ]


def read_flags(argv: list[str]) -> tuple[CheckpointsConfig, dict]:
    """Returns (flags, content of the run's config.json). Raises UserError."""
    config = parse_args(CheckpointsConfig, argv)
    file = os.path.join(config.checkpoints, "config.json")
    if not os.path.isfile(file):
        raise UserError(f"--checkpoints {config.checkpoints}: no config.json there; pass the folder of a PPO run")
    saved = read_json(file, "--checkpoints")
    if not saved.get("policy_model_path"):
        raise UserError(f"--checkpoints: {file} names no policy_model_path; pass the folder of a PPO run")
    if saved.get("reward_fn") and not config.reward_paths + config.reward_fn:
        asked = " ".join(map(str, saved["reward_fn"])) if isinstance(saved["reward_fn"], list) else saved["reward_fn"]
        raise UserError(f"--checkpoints: the run's score is that of --reward_fn {asked}; pass it, if it may be run")
    scores = {"reward_model_path": saved.get("reward_model_path") or saved.get("critic_model_path")}
    words = _words(saved | ({} if saved.get("reward_fn") else scores), config.given)
    return parse_args(CheckpointsConfig, [*words, *argv]), saved


def _words(saved: dict, given: frozenset[str]) -> list[str]:
    """Returns the flags of a run, without those that are given, as on the command line."""
    own = {"seed", "reward_fn", "reward_fn_weights", "reward_fn_timeout"}
    words = []
    for name in sorted({x.name for x in fields(CheckpointsConfig)} - own - given):
        if saved.get(name) not in (None, "", []):
            value = saved[name]
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return words
