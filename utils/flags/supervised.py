"""Flags that the supervised stages (SFT, reward model) share. No torch."""

from dataclasses import dataclass, field
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range, fit_warmup, replace_default
from utils.flags.data import RecordFlags
from utils.flags.fields import Common
from utils.flags.run import RunFlags


@dataclass
class FitDataFlags:
    """Models and data: what is trained on what."""

    hf_model_name_or_path: Common[str] = ""
    """Model to start from: a Hugging Face folder or hub id"""
    tokenizer_name_or_path: Common[str | None] = None
    """Tokenizer: a folder, a tokenizer.model or a hub id. Default: --hf_model_name_or_path"""
    data_path: Common[list[str]] = field(default_factory=list)
    """Data: folders of *train* and *valid* files, files or hub ids (owner/name:config@split). A number after each
    sets its share: a 0.7 b 0.3"""
    context_truncate: Common[int] = 2048
    """Longest dialogue, in tokens; longer ones lose their oldest turns. The default is lowered to the model's window"""
    num_valid: Common[int] = 100
    """Records held out of the training data for evaluation if there is no *valid* file; 0: no evaluation then. The
    default is lowered to a tenth of small data"""


@dataclass
class FitScheduleFlags:
    """Training: length, batch size and learning rate."""

    train_steps: Common[int] = 1000
    """Optimizer steps. An epoch has as many as there are records, divided by --batch_size"""
    batch_size: Common[int] = 32
    """Records per optimizer step, over all GPUs. The default is raised to the number of GPUs"""
    lr: Common[float] = 1e-5
    """Peak learning rate"""
    warmup_steps: Common[int] = 100
    """Steps over which the learning rate rises linearly to --lr; 0: none. The default is lowered in a short run"""
    lr_schedule: Common[Literal["inverse_sqrt", "cosine", "linear", "constant"]] = "cosine"
    """Learning rate after the warm-up. cosine and linear end at a tenth of --lr"""
    micro_batch_tokens: Common[int] = 8192
    """Tokens per forward pass on each GPU, padding included. Changes speed and memory only"""
    log_every: int = 10
    """Steps between printed lines, also called --print_interval; metrics.jsonl and TensorBoard get every step"""


@dataclass
class FitConfig(FitDataFlags, RecordFlags, FitScheduleFlags, RunFlags):
    """All flags of a supervised run; stages inherit and set their own defaults."""

    required = ("hf_model_name_or_path", "data_path", "model_save_path")
    base_flag = "hf_model_name_or_path"

    @property
    def even_tokens(self) -> int:
        """For `utils.models.chunked_logprobs.sum_nll`: under ZeRO-3 the most tokens of any forward pass, else 0."""
        return max(self.micro_batch_tokens, 2 * self.context_truncate) if self.zero_stage == 3 else 0

    def fit_window(self, window: int | None) -> None:
        """Lowers a default --context_truncate to the positions that the model was trained on."""
        if window and window < self.context_truncate:
            replace_default(self, "context_truncate", window, "that is the model's window")

    def check_ranks(self, num_ranks: int) -> None:
        """Raises a default --batch_size to one record per rank. Raises UserError for an explicit one that is lower."""
        if self.batch_size < num_ranks:
            replace_default(self, "batch_size", num_ranks, f"there are {num_ranks} ranks")
        if self.batch_size < num_ranks:
            raise UserError(f"--batch_size {self.batch_size} is less than the {num_ranks} ranks; raise it")

    def fit_batch(self, num_records: int, least: int) -> None:
        """Lowers a default --batch_size to the number of records, if that is at least `least`."""
        if least <= num_records < self.batch_size:
            replace_default(self, "batch_size", num_records, f"there are {num_records} records")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self, train_steps=(1, None), batch_size=(1, None), micro_batch_tokens=(1, None), lr=(0, None),
            context_truncate=(1, None), save_per_step=(1, None), num_valid=(0, None),
            warmup_steps=(0, None),
        )  # fmt: skip
        fit_warmup(self)
        if not self.lr:
            raise UserError("--lr 0 trains nothing: pass a positive number")
        self.tokenizer_name_or_path = self.tokenizer_name_or_path or self.hf_model_name_or_path
