"""Flags of a training run: its folder, checkpoints, resuming, limits of time. No torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from utils.errors import UserError
from utils.flags.checks import SEEDS, check_range
from utils.flags.engine import EngineConfig
from utils.flags.fields import Common
from utils.hub import check_target

# Flags that may differ when a run is resumed: they change where it writes, what it prints, its speed and its memory.
FREE_ON_RESUME = frozenset(
    [
        "model_save_path", "logdir", "report_to", "project", "run_name", "notify_url", "overwrite",
        "num_samples", "log_every", "resume", "resume_with_changes", "checkpoint_per_step",
        "checkpoint_minutes", "keep_checkpoints", "max_hours", "hang_timeout", "reward_fn_timeout",
        "ignore_hangup", "rollout_batch_size", "rollout_cache_tokens", "micro_batch_tokens",
        "gradient_checkpoint", "offload_frozen", "gather_for_generation", "plan", "plan_gpus", "plan_gpu",
        "plan_gpu_memory", "plan_network", "vllm_gpu_memory_utilization", "sampler_kl_limit", "data_cache",
        "data_workers", "export", "push_to_hub", "hub_private",
    ]
)  # fmt: skip


@dataclass
class RunFlags(EngineConfig):
    """Run: its folder, logs, checkpoints and evaluations."""

    aliases: ClassVar[dict[str, str]] = {"print_interval": "log_every"}  # other names of flags
    fingerprints: ClassVar[dict[str, dict[str, str]]] = {}  # flag -> file -> SHA-256; `start_run` sets it
    trains: ClassVar[str] = ""  # the kind of model, for its card: of KINDS in utils/models/card.py
    base_flag: ClassVar[str] = ""  # the flag of the model that it starts from

    model_save_path: Common[str] = ""
    """Folder of the run: config.json, metrics.jsonl, samples.jsonl, report.html, checkpoints/, best/, final/"""
    overwrite: Common[bool] = False
    """Replace the run that is already in --model_save_path"""
    seed: Common[int] = 42
    """Seed of the order of the data, the held-out split, the responses and a new head"""
    save_per_step: Common[int] = 100
    """Steps between evaluations on held-out data; the best model so far is saved to best/"""
    logdir: str | None = None
    """TensorBoard folder. Default: tensorboard/ in --model_save_path"""
    report_to: str = "none"
    """More experiment trackers, comma-separated, by their names in accelerate: wandb, swanlab, mlflow, ..."""
    project: str = ""
    """Project, or experiment, of the run in these. Default: ppo, critic, sft or reward"""
    run_name: str = ""
    """Name of the run in these and in notices. Default: the name of --model_save_path"""
    log_every: int = 1
    """Steps between printed lines; metrics.jsonl and TensorBoard get every step"""
    notify_url: str = ""
    """URL to which a notice is sent, a POST of JSON, when the run finishes, stops, fails or looks like a collapse.
    It is hidden wherever flags are written. env:NAME takes it from the variable NAME"""
    resume: Common[str] = "auto"
    """Checkpoint to resume from: a folder; auto: the newest complete one in --model_save_path; never: none"""
    resume_with_changes: bool = False
    """Resume even if flags that change the results, or the content of models and data, differ from the checkpoint's"""
    checkpoint_per_step: int = 50
    """Steps between checkpoints; 0: no checkpoints, even when the run is stopped"""
    checkpoint_minutes: float = 30.0
    """Minutes without a checkpoint after which one is written at the end of the step; 0: only every
    --checkpoint_per_step steps. With --checkpoint_per_step 0 there are none"""
    keep_checkpoints: int = 2
    """Number of checkpoints that are kept; older ones are deleted. With 1 there is none to fall back on"""
    max_hours: float = 0.0
    """Hours after which the run saves a checkpoint and exits with code 75, at the end of a step; 0: no limit"""
    hang_timeout: float = 1800.0
    """Seconds without progress after which a process prints its stacks and exits with code 124; 0: never. Must exceed
    the time to load a model, and the longest rollout, scoring, update, evaluation or export"""
    ignore_hangup: Literal["auto"] | bool = "auto"
    """Keep running after SIGHUP, which a process gets when its terminal or ssh session is lost. auto: true under nohup,
    tmux and screen. false: save a checkpoint and exit with code 129"""

    push_to_hub: str = ""
    """Upload final/ at the end to this model on the Hugging Face hub: OWNER/NAME, which is created if it is not there.
    Token and access are checked before the training"""
    hub_private: bool = True
    """Only the owner sees the model of --push_to_hub. false: everyone does"""

    @property
    def preset_values(self) -> dict:
        """Values that --preset gives to flags, in place of their defaults."""
        return {}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self, checkpoint_per_step=(0, None), checkpoint_minutes=(0, None), keep_checkpoints=(1, None),
            max_hours=(0, None), hang_timeout=(0, None), seed=SEEDS, log_every=(1, None),
        )  # fmt: skip
        if self.push_to_hub:
            check_target(self.push_to_hub, "--push_to_hub")
        if not self.resume:
            raise UserError("--resume is empty: pass auto, never or the folder of a checkpoint")
