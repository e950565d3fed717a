"""Where a run begins: at nothing, or at a checkpoint of the same run."""

import dataclasses
import json
import os

from utils.distributed import is_main, world_size
from utils.errors import UserError
from utils.files import check_writable
from utils.flags.parser import changed_flags
from utils.flags.run import FREE_ON_RESUME, RunFlags
from utils.run.checkpoint import Say
from utils.run.folder import check_inputs, holds_run, prepare_run_folder
from utils.run.logger import tracker_names
from utils.run.restore import Checkpoint, named, newest

# How a run is split over ranks, and which kernels it uses. They change roundings, and what ranks draw from streams of
# their own (dropout, --reward_fn).
SPLIT = ("world_size", "zero_stage", "offload_optimizer", "deterministic")


def identity(config: RunFlags) -> dict:
    """What a resumed run has to share with the one that it goes on with, as JSON gives it back."""
    flags = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_ON_RESUME}
    flags |= {"world_size": world_size(), "replaced_defaults": config.replaced_defaults}
    return json.loads(json.dumps(flags))


def _changed(config: RunFlags, saved: dict) -> list[str]:
    """Flags whose value is neither that of `saved` nor the default that `saved` replaced; given ones first."""
    same = [saved, saved.get("replaced_defaults", {})]
    now = {name: value for name, value in identity(config).items() if name in saved and name != "replaced_defaults"}
    changed = [name for name, value in now.items() if not any(name in x and x[name] == value for x in same)]
    return sorted(changed, key=lambda name: name not in config.given)


def check_folder(config: RunFlags, inputs: list[str | None]) -> None:
    """Raises UserError when --model_save_path cannot be used, without changing anything.

    A run that is in there already may go (--overwrite) or go on: it is unfinished, and has checkpoints or these very
    flags, so that a start from nothing repeats what it did.
    """
    path = config.model_save_path
    check_inputs(path, inputs)
    if holds_run(path) and not config.overwrite and not _may_go_on(config):
        if _is_finished(path) and _has_checkpoints(path) and config.resume == "auto":
            raise UserError(
                f"--model_save_path {path} already holds a run, which is finished: to go on to a larger --train_steps, "
                "add --resume_with_changes; to keep it, choose another folder; to replace it, add --overwrite"
            )
        raise UserError(f"--model_save_path {path} already holds a run: choose another folder, or add --overwrite")
    check_writable(path, "--model_save_path")


def _may_go_on(config: RunFlags) -> bool:
    path = config.model_save_path
    if config.resume == "never":
        return False
    if config.resume != "auto":
        return _is_inside(config.resume, path)
    if _is_finished(path) and not config.resume_with_changes:
        return False
    return _has_checkpoints(path) or _same_config(config)


def _is_finished(path: str) -> bool:
    return os.path.lexists(os.path.join(path, "final"))


def _is_inside(checkpoint: str, run: str) -> bool:
    return os.path.dirname(os.path.realpath(checkpoint)) == os.path.join(os.path.realpath(run), "checkpoints")


def _has_checkpoints(path: str) -> bool:
    folder = os.path.join(path, "checkpoints")
    return os.path.isdir(folder) and any(not name.endswith(".partial") for name in os.listdir(folder))


def _same_config(config: RunFlags) -> bool:
    try:
        with open(os.path.join(config.model_save_path, "config.json"), encoding="utf-8") as file:
            saved = json.load(file)
    except (OSError, ValueError):
        return False
    return identity(config).keys() <= saved.keys() and set(_changed(config, saved)) <= set(SPLIT)


def find_checkpoint(config: RunFlags, say: Say) -> Checkpoint | None:
    """The checkpoint that the run goes on from, by --resume and --overwrite. Collective; nothing is changed.

    Raises UserError for a checkpoint of other flags, by name, unless --resume_with_changes.
    """
    if config.resume not in ("auto", "never"):
        checkpoint = named(config.resume)
    elif config.resume == "auto" and not config.overwrite:
        checkpoint = newest(os.path.join(config.model_save_path, "checkpoints"), say)
    else:
        return None
    if checkpoint:
        _check_flags(checkpoint, config, say)
        say(f"going on from {checkpoint.path}")
        path = config.model_save_path
        if _is_finished(path):
            say(f"warning: the finished run's {path}/final goes, and its steps after {checkpoint.step} are made anew")
    return checkpoint


def _check_flags(checkpoint: Checkpoint, config: RunFlags, say: Say) -> None:
    saved, now = checkpoint.state["flags"], identity(config)
    for name in _changed(config, saved):
        was, wanted = saved[name], now[name]
        if name in SPLIT:
            what = "number of processes" if name == "world_size" else f"--{name}"
            say(f"resumed with another {what}: {wanted}, not {was}. The run is the same but for roundings and dropout")
            continue
        if not config.resume_with_changes:
            raise UserError(
                f"--{name} {wanted} is not what {checkpoint.path} was made with ({was}): give that, add "
                "--resume_with_changes to go on all the same, or --overwrite to start anew"
            )
        say(f"resumed with another --{name}: {wanted}, not {was}")


def begin_folder(config: RunFlags, checkpoint: Checkpoint | None) -> int:
    """Makes the run's folder ready, says what the run is, and returns the step that it begins after. Collective.

    What an earlier run wrote there after that step goes, checkpoints included; all of it, where the checkpoint is none
    of its own.
    """
    own = checkpoint is not None and _is_inside(checkpoint.path, config.model_save_path)
    prepare_run_folder(config.model_save_path, config, checkpoint.step if own else 0)
    if is_main():
        where = f"{config.model_save_path}/config.json"
        print(f"all flags: {where}; those with other values than the defaults:\n  {changed_flags(config)}", flush=True)
    return checkpoint.step if checkpoint else 0


INPUTS = (
    "policy_model_path",
    "critic_model_path",
    "reward_model_path",
    "hf_model_name_or_path",
    "data_path",
    "center_data_path",
)


def check_outputs(config) -> None:
    """Raises UserError when the run's folder, --logdir or a tracker of --report_to cannot be used. Changes nothing."""
    given = [getattr(config, name) for name in INPUTS if hasattr(config, name)]
    inputs = [path for paths in given for path in (paths if isinstance(paths, list) else [paths])]
    check_folder(config, inputs)
    if config.logdir:
        check_writable(config.logdir, "--logdir")
    names = tracker_names(config.report_to)
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"--report_to {name}: choose from {', '.join(sorted(LOGGER_TYPE_TO_CLASS))} or none")
        if name not in installed:
            raise UserError(f"--report_to {name}: its package is not installed; pip install {name}")
