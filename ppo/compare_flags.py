"""Flags of `python -m ppo.compare`. No torch."""

from dataclasses import dataclass, field
from typing import Literal

from ppo.flags.sampling import DecodingFlags, LengthFlags, RolloutEngineFlags
from ppo.judge_flags import JudgeFlags
from ppo.reward_fn_flags import RewardFunctionFlags
from reward.scoring.flags import RewardFlags
from utils.errors import UserError
from utils.flags.checks import SEEDS, check_range
from utils.flags.data import RecordFlags
from utils.flags.fields import Common


@dataclass
class CompareConfig(
    LengthFlags, DecodingFlags, RolloutEngineFlags, JudgeFlags, RewardFunctionFlags, RewardFlags, RecordFlags
):
    """Compare policies on held-out prompts: scores, lengths, KL, a judge's verdicts, with 95 % intervals.

    With --checkpoints RUN, score every kept policy of a run instead; --checkpoints RUN --help lists the flags for that.
    """

    required = ("policies", "data_path")
    vllm_tensor_parallel_size, hang_timeout = 1, 0.0  # no flags: there is one process

    policies: Common[list[str]] = field(default_factory=list)
    """Policies, before and after training: folders or hub ids. Each is compared with the first one; more than two get
    ratings, too"""
    data_path: Common[list[str]] = field(default_factory=list)
    """Prompts: the *valid* files of a folder, or all of them if it has none; a file or a hub id; or several"""
    output: Common[str | None] = None
    """JSON file for the table and all answers"""
    num_prompts: Common[int] = 256
    """Number of prompts"""
    num_samples: Common[int] = 3
    """Answers of each policy that are printed, those to the first prompts"""
    seed: Common[int] = 42
    """Seed of the answers and of the intervals"""
    rollout_batch_size: int = 64
    """Sequences decoded at once"""
    rollout_engine: Common[Literal["own", "vllm"]] = "own"
    """Engine that samples answers. vllm: vLLM in the same process, with a policy's weights copied to it and compared
    before it samples; all policies must have the same settings in config.json"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of all policies. Default: the first policy's"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, num_prompts=(1, None), num_samples=(0, None), seed=SEEDS)
        if len(self.policies) < 2:
            raise UserError("--policies has one value: pass two model folders or more, before and after")
        if not self.reward_model_path and not self.reward_fn and not self.judge_url:
            raise UserError("nothing scores the answers: pass --reward_model_path, --reward_fn or --judge_url")
