"""The folder of a run: checks before it is used, its preparation, and the description in config.json."""

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
from utils.files import atomic_file, disk_errors, recover, remove_own, write_json
from utils.run.index import ALWAYS, CHECKPOINT, LINES, MODELS, read_index, write_index

PACKAGES = (
    "torch", "transformers", "deepspeed", "accelerate", "datasets", "sentencepiece", "tensorboard", "safetensors"
)  # fmt: skip
RUN_FILES = (*ALWAYS, "tensorboard", "checkpoints", "bad_batches")


def holds_run(path: str) -> bool:
    """Whether a folder holds files of a run."""
    return any(os.path.lexists(os.path.join(path, name)) for name in RUN_FILES)


def check_inputs(path: str, inputs: list[str | None]) -> None:
    """Raises UserError if --model_save_path contains one of `inputs`, models and data that the run reads."""
    real = os.path.realpath(path)
    for source in inputs:
        if source and os.path.exists(source) and os.path.commonpath([real, os.path.realpath(source)]) == real:
            raise UserError(f"--model_save_path {path} would overwrite {source}, which this run reads; use another one")


def check_owned(path: str) -> None:
    """Raises UserError if a folder holds a file or model of the user's under a name that a run writes."""
    for name in ALWAYS:
        if os.path.lexists(file := os.path.join(path, name)) and name not in read_index(path).names:
            raise UserError(f"--model_save_path: {file} was not written by a run; move it, or use another folder")


def prepare_run_folder(path: str, config, step: int = 0) -> None:
    """Writes config.json, and removes what an earlier run wrote after `step` (0: all of it). Collective.

    config.json is replaced, never removed, so that a run that is killed here is still known by its flags.
    """
    barrier()
    if is_main():
        description = run_description(config) | {"resumed_from_step": step}
        with disk_errors(f"--model_save_path {path}"):
            os.makedirs(path, exist_ok=True)
            index = read_index(path)
            recover(os.path.join(path, MODELS[0]))
            for name in index.names.keys() - {"config.json"} if not step else {"final"}:
                remove_own(os.path.join(path, name), index.names.pop(name, []))
            for later in [number for number in index.checkpoints if number > step]:
                remove_own(os.path.join(path, "checkpoints", f"step_{later}"), CHECKPOINT)
                index.checkpoints.remove(later)
            index.names = {name: [] for name in ALWAYS} | index.names
            index.last_checkpoint = step
            write_index(path, index)
            for name in LINES if step else ():
                cut_lines(os.path.join(path, name), step)
            write_json(os.path.join(path, "config.json"), description, "--model_save_path")
    barrier()


def cut_lines(path: str, step: int) -> None:
    """Removes the lines of a .jsonl file after `step` (key "step"), and a line that is incomplete."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file, atomic_file(path) as kept:
        for line in file:
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:
                break
            kept.write(line.decode())


def run_description(config) -> dict:
    """Returns all flags, argv, versions, git commit and devices, so that the run can be repeated."""
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
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _git_commit() -> str | None:
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__)).stdout.strip() or None
