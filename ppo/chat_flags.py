"""Flags of `python -m ppo.chat`. No torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from ppo.flags.sampling import LengthFlags
from reward.scoring.flags import RewardFlags
from utils.errors import UserError
from utils.flags.checks import SEEDS, check_range
from utils.flags.fields import Common


@dataclass
class ChatConfig(LengthFlags, RewardFlags):
    """Talk to a model, or to two side by side, with the score of a reward model under each answer."""

    required = ("model",)
    aliases: ClassVar[dict[str, str]] = {"reward_model": "reward_model_path"}
    rollout_batch_size, rollout_cache_tokens, micro_batch_tokens = 1, 0, 1  # no flags: there is one dialogue

    model: Common[str] = ""
    """Model to talk to: a folder, also one of adapters, or a hub id"""
    compare: Common[str] = ""
    """Second model, such as the policy before training, which answers the same questions in a dialogue of its own. It
    reads with the tokenizer of --model"""
    reward_model_path: Common[list[str]] = field(default_factory=list)
    """Reward model that scores each answer, or several: folders or hub ids. Also called --reward_model"""
    system: Common[str] = ""
    """System turn of each dialogue; the moss templates put it before the first question"""
    temperature: Common[float | None] = None
    """Sampling temperature; 0: the most likely token each time. Default: as in evaluation"""
    topp: Common[float | None] = None
    """Nucleus sampling: smallest set of tokens with this total probability. Default: as in evaluation"""
    repetition_penalty: float | None = None
    """Factor that divides positive and multiplies negative logits of tokens that the answer already has. Default: as in
    evaluation"""
    seed: Common[int] = 42
    """Seed of the answers; the same questions in the same order get the same answers"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of all models. Default: that of --model"""

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = {"temperature": (0, None), "topp": (1e-6, 1), "repetition_penalty": (0.01, None), "seed": SEEDS}
        check_range(self, **{name: limit for name, limit in limits.items() if getattr(self, name) is not None})
        if self.temperature and self.temperature < 0.01:
            raise UserError(f"--temperature {self.temperature:g}: pass 0 for the most likely tokens, or at least 0.01")

    @property
    def policies(self) -> list[tuple[str, str]]:
        """(flag, path) of each model that answers."""
        pairs = [("--model", self.model), ("--compare", self.compare)]
        return [pair for pair in pairs if pair[1]]
