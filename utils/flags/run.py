"""The flags with which a run survives: resuming, checkpoints, limits of time. No torch."""

from dataclasses import dataclass

from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.engine import EngineConfig

# Flags that a resumed run may change freely: where it writes, how it is watched, what only speed and memory depend on.
FREE_ON_RESUME = frozenset(
    [
        "model_save_path",
        "logdir",
        "report_to",
        "overwrite",
        "num_samples",
        "print_interval",
        "resume",
        "resume_with_changes",
        "checkpoint_per_step",
        "keep_checkpoints",
        "max_hours",
        "hang_timeout",
        "rollout_batch_size",
        "rollout_cache_tokens",
        "micro_batch_tokens",
        "gradient_checkpoint",
        "offload_frozen",
        "gather_for_generation",
        "plan",
        "plan_gpus",
        "plan_gpu",
        "plan_gpu_memory",
    ]
)


@dataclass
class RunFlags(EngineConfig):
    """How a training run is kept, resumed and ended."""

    resume: str = "auto"
    """auto: go on from the newest whole checkpoint in --model_save_path, if there is one; never; or a checkpoint's
    folder"""
    resume_with_changes: bool = False
    """Resume although flags that alter the run have changed"""
    checkpoint_per_step: int = 50
    """Steps between checkpoints; 0: none, not even when the run is stopped"""
    keep_checkpoints: int = 2
    """Checkpoints that are kept; older ones go. With 1 there is none to fall back on"""
    max_hours: float = 0.0
    """Save and stop (exit code 75) at the first step that ends after this many hours; 0: no limit"""
    hang_timeout: float = 1800.0
    """Seconds without progress after which a process ends with a stack dump (exit code 124), such as when another rank
    has died; more than the longest rollout, scoring, update or evaluation takes. 0: never"""

    @property
    def preset_values(self) -> dict:
        """Values that --preset gives to flags, in place of their defaults."""
        return {}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self, checkpoint_per_step=(0, None), keep_checkpoints=(1, None), max_hours=(0, None), hang_timeout=(0, None)
        )
        if not self.resume:
            raise UserError("--resume is empty: give auto, never or the folder of a checkpoint")
