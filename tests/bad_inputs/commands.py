"""The project's commands with flags that work on tiny inputs, which a case then changes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import data.show
import ppo.chat
import ppo.compare
import reward.evaluate
import reward.score
import reward.strength
import reward.train
import sft.train
import train_ppo
from merge_weight_en import RELEASE
from utils.weight_diff import commands as weight_commands

PPO = {
    "policy_model_path": "{policy}", "critic_model_path": "{reward}", "data_path": "{prompts}",
    "model_save_path": "{folder}/out", "dtype": "fp32", "train_steps": 2, "warmup_steps": 1, "num_rollouts": 8,
    "batch_size": 4, "maxlen_prompt": 80, "maxlen_res": 12, "num_eval_prompts": 3,
}  # fmt: skip
FIT = {
    "hf_model_name_or_path": "{policy}", "data_path": "{eight}", "model_save_path": "{folder}/out", "dtype": "fp32",
    "train_steps": 1, "warmup_steps": 1, "batch_size": 4, "context_truncate": 64, "num_valid": 2,
}  # fmt: skip
COMPARE = {
    "policies": ["{policy}", "{other_policy}"], "data_path": "{prompts}", "reward_model_path": "{reward}",
    "dtype": "fp32", "maxlen_prompt": 80, "maxlen_res": 12, "output": "{folder}/out/table.json",
}  # fmt: skip
CHAT = {"model": "{policy}", "dtype": "fp32", "maxlen_prompt": 80, "maxlen_res": 12}
SHOW = {"data_path": "{pairs}", "tokenizer_name_or_path": "{judge}", "num_records": 1}
MERGE = {"path_raw": "{raw}", "path_diff": "{diff}", "path_tuned": "{folder}/out", "model_type": "policy"}


@dataclass(frozen=True)
class Command:
    """module: what `python -m` runs in a process of its own; words: what stands before the flags."""

    main: Callable[[list[str]], None]
    module: str
    flags: dict
    words: list[str] = field(default_factory=list)


COMMANDS = {
    "ppo": Command(train_ppo.main, "train_ppo", PPO),
    "sft": Command(sft.train.main, "sft.train", FIT),
    "reward": Command(
        reward.train.main, "reward.train", FIT | {"data_path": "{pairs}", "context_truncate": 256}
    ),
    "score": Command(
        reward.score.main, "reward.score", {"model": "{judge}", "input": "{records}", "dtype": "fp32"}
    ),
    "evaluate": Command(
        reward.evaluate.main, "reward.evaluate", {"model": "{judge}", "data_path": "{pairs}", "dtype": "fp32"}
    ),
    "strength": Command(
        reward.strength.main,
        "reward.strength",
        {"model": ["{judge}", "{other_judge}"], "data_path": "{pairs}", "dtype": "fp32", "output": "{folder}/out"},
    ),
    "compare": Command(ppo.compare.main, "ppo.compare", COMPARE),
    "chat": Command(ppo.chat.main, "ppo.chat", CHAT),
    "show": Command(data.show.main, "data.show", SHOW),
    "merge": Command(lambda argv: weight_commands.run(RELEASE, "", argv), "merge_weight_en", MERGE, ["recover"]),
}  # fmt: skip
