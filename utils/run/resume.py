"""Decides whether a run starts at step 0 or resumes from a checkpoint, and checks its output paths."""

import dataclasses
import json
import os

from utils.distributed import is_main, world_size
from utils.errors import Say, UserError
from utils.files import check_writable, read_json
from utils.flags.parser import changed_flags
from utils.flags.run import FREE_ON_RESUME, RunFlags
from utils.run.checkpoint import all_checkpoints
from utils.run.folder import check_inputs, check_regular, holds_run, prepare_run_folder
from utils.run.logger import tracker_names
from utils.run.restore import Checkpoint, SavedFlags, TrainerState, named, newest

# May change on resume, with a message: the run stays the same except for rounding and for the random streams of each
# rank, which dropout and --reward_fn use.
SPLIT = ("world_size", "zero_stage", "offload_optimizer", "deterministic")


def identity(config: RunFlags) -> dict:
    """Returns the flags that a resumed run has to share with the original one, as JSON reads them back."""
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
    """Raises UserError if --model_save_path cannot be used. Writes nothing.

    A run that is there may be overwritten (--overwrite), or resumed if it is unfinished and has either checkpoints or
    the same flags.
    """
    path = config.model_save_path
    check_inputs(path, inputs)
    if holds_run(path) and not config.overwrite and not _can_resume(config):
        if _is_finished(path) and _has_checkpoints(path) and config.resume == "auto":
            raise UserError(
                f"--model_save_path {path} already holds a run, which is finished: to go on to a larger --train_steps, "
                "pass --resume_with_changes; to keep it, use another folder; to replace it, pass --overwrite"
            )
        raise UserError(f"--model_save_path {path} already holds a run; use another folder, or pass --overwrite")
    check_writable(path, "--model_save_path")
    if not config.overwrite:
        check_regular(path)


def _can_resume(config: RunFlags) -> bool:
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
    return bool(all_checkpoints(os.path.join(path, "checkpoints")))


def _same_config(config: RunFlags) -> bool:
    try:
        saved = read_json(os.path.join(config.model_save_path, "config.json"), kind=SavedFlags)
    except (OSError, ValueError):
        return False
    return identity(config).keys() <= saved.keys() and set(_changed(config, saved)) <= set(SPLIT)


def find_checkpoint(config: RunFlags, say: Say, kind: type[TrainerState]) -> Checkpoint | None:
    """Returns the checkpoint to resume from, or None. Raises UserError if flags differ from its own. Collective."""
    if config.resume not in ("auto", "never"):
        checkpoint = named(config.resume, kind)
    elif config.resume == "auto" and not config.overwrite:
        checkpoint = newest(os.path.join(config.model_save_path, "checkpoints"), say, kind)
    else:
        return None
    if checkpoint:
        _check_flags(checkpoint, config, say)
        say(f"resuming from {checkpoint.path}")
        path = config.model_save_path
        if _is_finished(path):
            say(f"warning: {path}/final is removed; steps after {checkpoint.step} run again")
    return checkpoint


def _check_flags(checkpoint: Checkpoint, config: RunFlags, say: Say) -> None:
    saved, now = checkpoint.state["flags"], identity(config)
    for name in _changed(config, saved):
        was, wanted = saved[name], now[name]
        if name in SPLIT:
            what = "number of processes" if name == "world_size" else f"--{name}"
            say(f"resumed with another {what}: {wanted}, not {was}; only rounding and dropout differ")
            continue
        if not config.resume_with_changes:
            raise UserError(
                f"--{name} {wanted} differs from {checkpoint.path} ({was}); use that value, or pass "
                "--resume_with_changes to resume anyway, or --overwrite to start at step 0"
            )
        say(f"resumed with another --{name}: {wanted}, not {was}")


def begin_folder(config: RunFlags, checkpoint: Checkpoint | None) -> int:
    """Prepares the run's folder, prints the flags, and returns the number of steps already done. Collective."""
    own = checkpoint is not None and _is_inside(checkpoint.path, config.model_save_path)
    prepare_run_folder(config.model_save_path, config, checkpoint.step if own else 0)
    if is_main():
        where = f"{config.model_save_path}/config.json"
        print(f"all flags: {where}; flags that differ from their defaults:\n  {changed_flags(config)}", flush=True)
    return checkpoint.step if checkpoint else 0


INPUTS = (
    "policy_model_path", "critic_model_path", "reward_model_path", "hf_model_name_or_path", "data_path",
    "center_data_path",
)  # fmt: skip


def check_outputs(config) -> None:
    """Raises UserError if --model_save_path, --logdir or a tracker of --report_to cannot be used. Writes nothing."""
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
            raise UserError(f"--report_to {name}: unknown; use {', '.join(sorted(LOGGER_TYPE_TO_CLASS))} or none")
        if name not in installed:
            raise UserError(f"--report_to {name}: its package is not installed; pip install {name}")
