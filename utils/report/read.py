"""Reads what a run of any stage wrote, finished or in progress. No torch."""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from utils.errors import UserError
from utils.files import parse_row, read_bytes, read_json
from utils.report.choose import choose_rows
from utils.schema import Count, Schema

MAX_SAMPLES = 400  # texts in a page
# As the logger writes it, so that rows which are not shown need not be parsed.
_ROW = re.compile(rb'\{"step": (\d{1,15})(, "held_out": true)?')
_Number = Annotated[float, Field(allow_inf_nan=True)]


class _Config(Schema):
    """What is relied on in config.json. changed_flags: flag -> the default that it differs from."""

    train_steps: Count = 0
    critic_pretrain_steps: Count = 0
    best_max_kl: _Number = math.inf
    validation_metric: str = "loss"
    changed_flags: dict[str, Any] = Field(default_factory=dict)


class _Answer(Schema):
    prompt: str
    answer: str
    answer_after: str


class _Comparison(Schema):
    table: dict[str, dict[str, Annotated[list[_Number], Field(min_length=3, max_length=3)]]]
    answers: list[_Answer]


@dataclass
class RunFiles:
    """What a run wrote. stage: ppo, reward or sft; num_samples: rows of samples.jsonl, of which `samples` has some.

    best: the row of the evaluation that best/ has; num_alarms: steps with an alarm, None if the
    stage has none; remarks: sentences for the head of the report.
    """

    name: str
    stage: str
    config: dict
    metrics: list[dict]
    samples: list[dict]
    num_samples: int
    comparison: dict | None
    written: float  # time of the last step, seconds since 1970
    has_final: bool
    has_best: bool
    num_bad_batches: int
    best: dict | None = None
    num_alarms: int | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """Returns the last step that is done."""
        return self.metrics[-1]["step"]

    @property
    def total_steps(self) -> int:
        """Returns the steps that the run is to make; 0 if it does not say."""
        steps = self.config.get("train_steps", 0)
        return steps + self.config.get("critic_pretrain_steps", 0) if steps else 0


def read_run(folder: str | Path, max_samples: int = MAX_SAMPLES) -> RunFiles:
    """Returns what is in a run's folder. Raises UserError if it is none, is damaged, or has no step yet."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not the folder of a run (no config.json there): give its --model_save_path")
    file = folder / "metrics.jsonl"
    metrics = [row for line in _lines(file) if (row := parse_row(line))]
    names = set().union(*metrics)
    stage = "ppo" if names & {"score_mean", "kl_ref", "value_loss"} else "reward" if "accuracy" in names else "sft"
    if stage == "sft" and "loss" not in names:
        raise UserError(f"{file} has no step of a run yet: wait until the first step has been made")
    config = read_json(folder / "config.json", "RUN", _Config)
    comparison = folder / "comparison.json"
    samples, num_samples = _samples(folder / "samples.jsonl", max_samples)
    bad = folder / "bad_batches"
    return RunFiles(
        name=str(folder),
        stage=stage,
        config=config,
        metrics=sorted(metrics, key=lambda row: row["step"]),
        samples=samples,
        num_samples=num_samples,
        comparison=read_json(comparison, "RUN", _Comparison) if os.path.lexists(comparison) else None,
        written=file.stat().st_mtime,
        has_final=(folder / "final").is_dir() or (folder / "final_adapter").is_dir(),
        has_best=(folder / "best").is_dir() or (folder / "best_adapter").is_dir(),
        num_bad_batches=len(list(bad.iterdir())) if bad.is_dir() else 0,
    )


def _lines(file: Path) -> list[bytes]:
    """Returns the lines of a file that a run writes, without one that is not finished; [] without a file."""
    return read_bytes(file).split(b"\n")[:-1] if file.is_file() else []


def _samples(file: Path, limit: int) -> tuple[list[dict], int]:
    """Returns rows that have a prompt and an answer, at most `limit`, and the number of all."""
    found = [(match, line) for line in _lines(file) if (match := _ROW.match(line))]
    chosen = choose_rows([(int(match[1]), bool(match[2])) for match, _ in found], limit)
    rows = [parse_row(found[i][1]) for i in chosen]
    texts = ("prompt", "answer")
    return [row for row in rows if row and all(isinstance(row.get(key), str) for key in texts)], len(found)
