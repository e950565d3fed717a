"""Index of what a run wrote, `run_index.json` in its folder: only what is listed there is ever removed.

A name is listed before it is made; `NAME.partial` and `NAME.old.partial` are temporary copies of what is listed. Files
that a user puts into a listed folder stay when it is removed, and are carried over when it is replaced.
"""

import os
import re
from typing import Literal

from pydantic import Field

from utils.errors import UserError
from utils.files import read_json, recover, remove, write_json
from utils.run.own_files import files_in
from utils.schema import Schema, checked

INDEX = "run_index.json"
LINES = ("metrics.jsonl", "samples.jsonl")
REPORT = "report.html"
MODELS = ("best", "final")
OTHER_MODELS = ("final_ema", "best_adapter", "final_adapter")
ALWAYS = ("config.json", *LINES, REPORT, *MODELS)  # listed by every run
MANIFEST = "manifest.json"
TRACKERS = "trackers.json"  # ids of the run in the trackers of --report_to
CHECKPOINT = [MANIFEST, "state.json", "*-rank*.safetensors", "random-rank*.json"]  # names in checkpoints/step_N


class RunIndex(Schema):
    """Names in a run's folder -> names in these, or patterns; steps of checkpoints; the last complete one, or 0."""

    names: dict[Literal[*ALWAYS, "tensorboard", "bad_batches", TRACKERS, *OTHER_MODELS], list[str]] = Field(
        default_factory=dict
    )
    checkpoints: list[int] = Field(default_factory=list)
    last_checkpoint: int = 0


def read_index(run: str) -> RunIndex:
    """Returns the index of a run's folder, or what its files suggest if there is none. Raises UserError."""
    file = os.path.join(run, INDEX)
    if not os.path.lexists(file):
        return _index_of_older_run(run)
    try:
        return checked(RunIndex, read_json(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it: the run's files are then known by name") from error


def _index_of_older_run(run: str) -> RunIndex:
    """Returns an index by names, for runs of versions without one.

    Checkpoints: step_N that contain a manifest; where config.json is a run's, also step_N.partial.
    """
    index, folder = RunIndex(), os.path.join(run, "checkpoints")
    try:
        saved = read_json(os.path.join(run, "config.json"))
    except (OSError, ValueError, RecursionError):
        saved = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        match = re.fullmatch(r"step_(\d+)(\.partial)?", name)
        if match and ("argv" in saved if match[2] else os.path.exists(os.path.join(folder, name, MANIFEST))):
            index.checkpoints.append(int(match[1]))
    if "argv" in saved or index.checkpoints:
        index.names = {name: files_in(os.path.join(run, name)) for name in ALWAYS}
        index.names |= {"tensorboard": ["events.out.tfevents.*"], "bad_batches": ["step_*"]}
    every, metrics = saved.get("checkpoint_per_step"), os.path.join(run, LINES[0])
    if isinstance(every, int) and every and os.path.isfile(metrics):
        with open(metrics, "rb") as lines:
            index.last_checkpoint = sum(1 for _ in lines) // every * every
    return index


def write_index(run: str, index: RunIndex) -> None:
    """Replaces the index of a run's folder."""
    write_json(os.path.join(run, INDEX), index.model_dump())


def record(run: str, name: str, *names: str) -> None:
    """Lists `names` of files, or patterns, in the folder `name` of a run, before they are made."""
    index = read_index(run)
    index.names[name] = sorted({*index.names.get(name, ()), *names})
    write_index(run, index)


def remove_partials(folder: str) -> RunIndex:
    """Removes a run's incomplete checkpoints from checkpoints/. Returns the index without those that are gone."""
    index = read_index(os.path.dirname(folder))
    paths = {step: os.path.join(folder, f"step_{step}") for step in index.checkpoints}
    for path in paths.values():
        remove(f"{path}.partial")
        recover(path)
    index.checkpoints = [step for step, path in paths.items() if os.path.lexists(path)]
    return index
