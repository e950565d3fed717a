"""The flags that supervised stages share (reward model, SFT). No torch: a wrong flag is answered at once."""

from dataclasses import dataclass
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import SEEDS, check_range, check_warmup
from utils.flags.run import RunFlags


@dataclass
class FitConfig(RunFlags):
    """Model, data, sizes and schedule of a supervised run; stages inherit and set their own defaults."""

    hf_model_name_or_path: str = ""
    """Model to start from: a Hugging Face folder or hub id"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer folder, tokenizer.model or hub id; default: --hf_model_name_or_path"""
    data_path: str = ""
    """A folder of *train.json(l) and *valid.json(l), a file or a hub id"""
    model_save_path: str = ""
    """Folder of the run: config.json, metrics.jsonl, best/, final/"""
    logdir: str | None = None
    """TensorBoard folder; default: tensorboard/ in the run's folder"""
    report_to: str = "none"
    """More trackers, comma-separated, by accelerate's names: wandb, swanlab, mlflow, ..."""
    overwrite: bool = False
    """Replace a run that is already in --model_save_path"""
    seed: int = 42
    """Seeds the order of the data, what is held out, and a new head"""

    lr: float = 1e-5
    """Peak learning rate"""
    lr_schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up; cosine and linear end at a tenth"""
    train_steps: int = 1000
    """Optimizer steps"""
    warmup_steps: int = 100
    """Steps of linear warm-up, the first of them at lr / warmup_steps"""
    batch_size: int = 32
    """Items an optimizer step, over all ranks"""
    micro_batch_tokens: int = 8192
    """Tokens of a forward pass, padding included, a device: speed and memory only"""
    context_truncate: int = 2048
    """Longest dialogue, tokens; the oldest turns of longer ones go first"""
    save_per_step: int = 100
    """Steps between evaluations; the best model so far goes to best/"""
    print_interval: int = 10
    """Steps between printed lines; metrics.jsonl and TensorBoard get every step"""
    num_valid: int = 100
    """Items taken off the training data for evaluation when it comes without a *valid* file; 0: no evaluation then"""

    @property
    def even_tokens(self) -> int:
        """For `utils.models.chunked_logprobs.sum_nll`: under ZeRO-3 the most tokens of any forward, else 0."""
        return max(self.micro_batch_tokens, 2 * self.context_truncate) if self.zero_stage == 3 else 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hf_model_name_or_path", "data_path", "model_save_path"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing: give it a path")
        sizes = "train_steps warmup_steps batch_size micro_batch_tokens context_truncate save_per_step print_interval"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give at least 1")
        check_warmup(self)
        check_range(self, num_valid=(0, None), lr=(0, None), seed=SEEDS)
        if not self.lr:
            raise UserError("--lr 0 trains nothing: give a positive number")
        self.tokenizer_name_or_path = self.tokenizer_name_or_path or self.hf_model_name_or_path
