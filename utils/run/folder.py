"""The folder of a run: checks before it is used, its preparation, and the description in config.json."""

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata

from utils.distributed import barrier, is_main
from utils.errors import UserError
from utils.files import atomic_file, disk_errors, open_regular, parse_row, recover, write_json
from utils.flags.parser import changed_defaults
from utils.run.fingerprints import code_files, digest_of
from utils.run.index import ALWAYS, CHECKPOINT, LINES, MODELS, REPORT, read_index, write_index
from utils.run.own_files import remove_own

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
        listed = read_index(path).names
        if name == REPORT and LINES[0] in listed:  # of a version that did not list it; `ppo.report` made it
            continue
        if os.path.lexists(file := os.path.join(path, name)) and name not in listed:
            raise UserError(f"--model_save_path: {file} was not written by a run; move it, or use another folder")


def check_regular(path: str) -> None:
    """Raises UserError if a run would go on in a folder whose config.json or .jsonl file is a pipe or a folder."""
    for file in (os.path.join(path, name) for name in RUN_FILES if "." in name):
        if os.path.lexists(file) and not os.path.isfile(file):
            raise UserError(f"--model_save_path: {file} is not a regular file; move it, or use another folder")


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
            for name in (MODELS[0], "best_adapter"):
                recover(os.path.join(path, name))
            for name in index.names.keys() - {"config.json"} if not step else {"final", "final_ema", "final_adapter"}:
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
    """Removes a run's lines of steps after `step` from a .jsonl file, and an unfinished one at its end.

    Lines that no run wrote, which have no whole number `step`, stay as they are.
    """
    if not os.path.exists(path):
        return
    with open_regular(path) as file, atomic_file(path) as kept:
        for line in file:
            row, whole = parse_row(line), line.endswith(b"\n")
            if row["step"] <= step if row else whole or line[:1] not in b"{\0":  # nulls: of a power cut
                kept.buffer.write(line if whole else line + b"\n")


def run_description(config) -> dict:
    """Returns all flags, argv, versions, code, inputs and devices, so that the run can be repeated."""
    import torch

    from utils.device import on_gpu

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu() else []
    return {
        **dataclasses.asdict(config),
        "replaced_defaults": config.replaced_defaults,
        "changed_flags": changed_defaults(config),
        "argv": sys.argv,
        "versions": versions(),
        "git_commit": _git_commit(),
        "code": digest_of(code_files()),
        "inputs": config.fingerprints,
        "devices": gpus or [f"{os.cpu_count()} CPU cores"],
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages on which a run's numbers depend."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def _git_commit() -> str | None:
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__)).stdout.strip() or None
