"""Flags of `python -m ppo.benchmark`. No torch."""

from dataclasses import dataclass, field

from utils.errors import UserError
from utils.flags.checks import SEEDS, check_range
from utils.flags.engine import ForwardConfig
from utils.flags.fields import Common


@dataclass
class BenchmarkConfig(ForwardConfig):
    """Run lm-eval's tasks on a policy before and after training (needs lm-eval: pip install lm-eval==0.4.13)."""

    required = ("models", "tasks")

    models: Common[list[str]] = field(default_factory=list)
    """Two policies, before and after training: folders, adapters' folders or hub ids"""
    tasks: Common[list[str]] = field(default_factory=list)
    """Tasks, groups or tags of lm-eval, by name. Their data must be on this machine, unless HF_DATASETS_OFFLINE=0"""
    task_path: Common[str] = ""
    """Folder with tasks of your own, in lm-eval's YAML, which replace lm-eval's. PYTHON FILES THAT ITS TASKS NAME ARE
    RUN"""
    output: Common[str | None] = None
    """JSON file for the table and the metrics of each item"""
    limit: Common[int] = 0
    """First items of each task that are used; 0: all"""
    num_fewshot: int | None = None
    """Examples in front of each question. Default: the task's"""
    batch_size: Common[int] = 8
    """Sequences per forward pass. Changes speed and memory only"""
    apply_template: Common[bool] = True
    """Put each question into the template of training (--template). false: plain text, as for models without SFT"""
    seed: int = 42
    """Seed of the choice of examples"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer of both policies. Default: the first policy's"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, limit=(0, None), batch_size=(1, None), seed=SEEDS)
        if self.num_fewshot is not None:
            check_range(self, num_fewshot=(0, None))
        if len(self.models) != 2:
            raise UserError(f"--models has {len(self.models)} values: pass two model folders, before and after")
