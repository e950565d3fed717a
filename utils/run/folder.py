"""Folders on disk: a run's own, and files and folders that appear whole or not at all."""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata

from utils.distributed import barrier, is_main
from utils.errors import UserError
from utils.files import remove, write_json

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "datasets",
    "sentencepiece",
    "tensorboard",
    "safetensors",
)
RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "best", "final", "tensorboard")
RUN_FILES += ("checkpoints", "bad_batches")


def holds_run(path: str) -> bool:
    """Whether a run has written there."""
    return any(os.path.lexists(os.path.join(path, name)) for name in RUN_FILES)


def check_inputs(path: str, inputs: list[str | None]) -> None:
    """Raises UserError when --model_save_path holds one of `inputs`, models and data that the run reads."""
    real = os.path.realpath(path)
    for source in inputs:
        if source and os.path.exists(source) and os.path.commonpath([real, os.path.realpath(source)]) == real:
            raise UserError(f"--model_save_path {path} would overwrite {source}, which this run reads: choose another")


def prepare_run_folder(path: str, config, step: int = 0) -> None:
    """Makes the folder and writes config.json. Rank 0 writes, all ranks wait.

    config: a dataclass of flags. step: where the run goes on; all that an earlier one wrote after it goes (0: all).
    """
    barrier()
    if is_main():
        description = run_description(config) | {"resumed_from_step": step}
        try:
            os.makedirs(path, exist_ok=True)
            for name in RUN_FILES:
                file = os.path.join(path, name)
                if not step or name == "final":
                    remove(file)
                elif name.endswith(".jsonl"):
                    cut_lines(file, step)
            if step:
                drop_checkpoints(os.path.join(path, "checkpoints"), step)
            write_json(os.path.join(path, "config.json"), description)
        except OSError as error:
            raise UserError(f"--model_save_path {path} cannot be written: {error.strerror}") from None
    barrier()


def drop_checkpoints(folder: str, step: int) -> None:
    """Removes what lies in a folder of checkpoints from after `step`, and what a kill left half-written."""
    for name in os.listdir(folder):
        number = name.removeprefix("step_")
        if not number.isdigit() or int(number) > step:
            remove(os.path.join(folder, name))


def cut_lines(path: str, step: int) -> None:
    """Leaves the lines of a .jsonl file up to `step` (key "step"); later ones go, and one that a kill cut short."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file, open(f"{path}.partial", "wb") as kept:
        for line in file:
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:
                break
            kept.write(line)
    os.replace(f"{path}.partial", path)


def run_description(config) -> dict:
    """All flags, argv, versions, git commit and devices: what it takes to repeat a run."""
    import torch

    from utils.device import on_gpu

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu() else []
    return {
        **dataclasses.asdict(config),
        "replaced_defaults": config.replaced_defaults,
        "argv": sys.argv,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "git_commit": _git_commit(),
        "devices": gpus or [f"{os.cpu_count()} CPU cores"],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _git_commit() -> str | None:
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__)).stdout.strip() or None
