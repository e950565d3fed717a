"""Reads what a run of any stage wrote, finished or in progress. No torch."""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import Field

from utils.errors import UserError
from utils.files import open_regular, parse_row, read_json
from utils.report.choose import choose_rows, is_number, short_names
from utils.schema import Count, Schema

MAX_SAMPLES = 400  # texts in a page
# As the logger writes it, so that rows which are not shown need not be parsed.
_ROW = re.compile(rb'\{"step": (\d{1,15})(, "held_out": true)?')
_Number = Annotated[float, Field(allow_inf_nan=True)]
_Estimate = Annotated[list[_Number], Field(min_length=3, max_length=3)]
_Table = dict[str, dict[str, _Estimate]]


class _Config(Schema):
    """What is relied on in config.json. changed_flags: flag -> the default that it differs from."""

    train_steps: Count = 0
    critic_pretrain_steps: Count = 0
    pretrain: bool = False
    best_max_kl: _Number = math.inf
    validation_metric: str = "loss"
    changed_flags: dict[str, Any] = Field(default_factory=dict)


class _Answer(Schema):
    prompt: str
    answer: str
    answer_after: str


class _Ratings(Schema):
    ratings: list[_Estimate | None]


class _Pair(Schema):
    policies: Annotated[list[Count], Field(min_length=2, max_length=2)]
    prompts: Count
    win_rate: _Estimate | None = None
    length_controlled_win_rate: _Estimate | None = None


class _Judge(Schema):
    model: str
    pairs: list[_Pair]


class _Comparison(Schema):
    """What ppo.compare writes. tables: of each policy but the first; ratings: if there are more than two policies."""

    policies: list[str] = Field(default_factory=list)
    table: _Table
    tables: list[_Table] = Field(default_factory=list)
    answers: list[_Answer]
    ratings: dict[str, _Ratings] = Field(default_factory=dict)
    judge: _Judge | None = None


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
        steps, of_critic = (self.config.get(f"{name}_steps", 0) for name in ("train", "critic_pretrain"))
        if self.trains_critic_only:
            return of_critic
        return steps + of_critic if steps else 0

    @property
    def trains_critic_only(self) -> bool:
        """Returns whether it is a run of `ppo.critic`, which may reach its target before the last step."""
        return self.config.get("pretrain", False)

    @property
    def num_rollbacks(self) -> float:
        """Returns how often the run went back to a checkpoint after an alarm."""
        count = self.metrics[-1].get("rollbacks")
        return count if is_number(count) and count > 0 else 0

    @property
    def policies(self) -> list[str]:
        """Returns short names of the policies that were compared."""
        return short_names(self.comparison.get("policies", [])) if self.comparison else []


def read_run(folder: str | Path, max_samples: int = MAX_SAMPLES) -> RunFiles:
    """Returns what is in a run's folder. Raises UserError if it is none, is damaged, or has no step yet."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not the folder of a run (no config.json there): give its --model_save_path")
    file = folder / "metrics.jsonl"
    metrics = metrics_of(folder)
    names = set().union(*metrics)
    stage = "ppo" if names & {"score_mean", "kl_ref", "value_loss"} else "reward" if "accuracy" in names else "sft"
    if stage == "sft" and "loss" not in names:
        raise UserError(f"{file} has no step of a run yet: wait until the first step has been made")
    config = read_json(folder / "config.json", "RUN", _Config)
    written = file.stat().st_mtime
    comparison, remarks = _comparison(folder / "comparison.json", written)
    samples, num_samples = _samples(folder / "samples.jsonl", max_samples)
    bad = folder / "bad_batches"
    return RunFiles(
        name=str(folder),
        stage=stage,
        config=config,
        metrics=sorted(metrics, key=lambda row: row["step"]),
        samples=samples,
        num_samples=num_samples,
        comparison=comparison,
        written=written,
        has_final=(folder / "final").is_dir() or (folder / "final_adapter").is_dir(),
        has_best=(folder / "best").is_dir() or (folder / "best_adapter").is_dir(),
        num_bad_batches=len(list(bad.iterdir())) if bad.is_dir() else 0,
        remarks=remarks,
    )


def metrics_of(folder: str | Path) -> list[dict]:
    """Returns the rows of a run's metrics.jsonl, without one that is being written; [] without the file."""
    file = Path(folder, "metrics.jsonl")
    if not file.is_file():
        return []
    with open_regular(file) as lines:
        return [row for line in lines if line.endswith(b"\n") and (row := parse_row(line))]


def _comparison(file: Path, written: float) -> tuple[dict | None, list[str]]:
    """Returns what ppo.compare wrote of this run's model, or None, and remarks. written: time of the last step."""
    if not os.path.lexists(file):
        return None, []
    try:
        found = read_json(file, kind=_Comparison)
        if file.stat().st_mtime >= written:
            return found, []
        problem, advice = "it is older than the last step", ", or touch it if it is of this model"
    except (OSError, ValueError) as error:
        problem, advice = f"it is damaged or not readable ({error})", ""
    return None, [f"{file.name} is left out, since {problem}: run ppo.compare again{advice}."]


def _samples(file: Path, limit: int) -> tuple[list[dict], int]:
    """Returns rows that have a prompt and an answer, at most `limit`, and the number of all."""
    if not file.is_file():
        return [], 0
    rows, offsets, offset = [], [], 0  # of the others no text is kept
    with open_regular(file) as lines:
        for line in lines:
            if (match := _ROW.match(line)) and line.endswith(b"\n"):
                rows.append((int(match[1]), bool(match[2])))
                offsets.append(offset)
            offset += len(line)
        shown = [_row_at(lines, offsets[i]) for i in choose_rows(rows, limit)]
    texts = ("prompt", "answer")
    return [row for row in shown if row and all(isinstance(row.get(key), str) for key in texts)], len(rows)


def _row_at(lines: BinaryIO, offset: int) -> dict | None:
    lines.seek(offset)
    return parse_row(lines.readline())
