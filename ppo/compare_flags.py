"""Flags of `python -m ppo.compare`."""

from dataclasses import dataclass, field

from reward.scoring.flags import RewardFlags
from utils.errors import UserError
from utils.flags.checks import SEEDS, check_range


@dataclass
class CompareConfig(RewardFlags):
    """Compare two policies on held-out prompts."""

    policies: list[str] = field(default_factory=list)
    """Two model folders: before and after"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of both; default: the first policy's"""
    reward_fn: str | None = None
    """file.py:function that scores them too; runs that file"""
    data_path: str = ""
    """Prompts: the *valid* files, or all where there are none"""
    output: str | None = None
    """JSON file for the table and all answers"""
    num_prompts: int = 256
    """How many prompts"""
    maxlen_prompt: int = 2048
    """Tokens of prompt and answer together"""
    maxlen_res: int = 512
    """Longest answer, tokens"""
    rollout_batch_size: int = 64
    """Sequences decoded at once"""
    rollout_cache_tokens: int = 0
    """Tokens that their key-value cache may hold; 0: no limit"""
    micro_batch_tokens: int = 8192
    """Tokens of a forward pass"""
    num_samples: int = 3
    """Answers shown side by side: those to the first prompts, not picked"""
    seed: int = 42
    """Of the answers and the intervals"""
    offload_frozen: bool = False
    """Keep the reward models in host memory between scorings, one on the device at a time"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, rollout_cache_tokens=(0, None))
        for name in ("num_prompts", "maxlen_res", "rollout_batch_size", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give at least 1")
        check_range(self, seed=SEEDS)
        if len(self.policies) != 2:
            raise UserError("--policies needs two model folders, before and after")
        if not self.data_path:
            raise UserError("--data_path is missing: give it a path")
        if self.maxlen_res >= self.maxlen_prompt:
            raise UserError(
                f"--maxlen_res {self.maxlen_res} leaves no room in --maxlen_prompt {self.maxlen_prompt}: lower it, or "
                "raise that"
            )
        if not self.reward_model_path and not self.reward_fn:
            raise UserError("give --reward_model_path or --reward_fn: something has to judge the answers")
