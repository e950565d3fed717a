"""Decides whether a run starts at step 0 or resumes from a checkpoint, and checks its output paths."""

import dataclasses
import json
import os
from pathlib import Path

from utils.distributed import is_main, world_size
from utils.errors import Say, UserError
from utils.files import ASIDE, check_writable, open_regular, parse_row, read_json
from utils.flags.checks import keep_sizes
from utils.flags.parser import changed_flags
from utils.flags.run import FREE_ON_RESUME, RunFlags
from utils.models.adapter_folder import chain, is_adapter
from utils.run.checkpoint import all_checkpoints
from utils.run.fingerprints import INPUTS, changes
from utils.run.folder import check_owned, check_regular, holds_run, prepare_run_folder
from utils.run.index import LINES, read_index
from utils.run.restore import Checkpoint, SavedFlags, TrainerState, named, newest
from utils.run.trackers import tracker_names

# May change on resume, with a message: the run stays the same except for rounding and for the random streams of each
# rank, which dropout and --reward_fn use.
SPLIT = (
    "world_size", "zero_stage", "offload_optimizer", "deterministic", "rollout_engine", "vllm_tensor_parallel_size",
    "vllm_batch_invariant", "share_base",
)  # fmt: skip


def identity(config: RunFlags) -> dict:
    """Returns the flags that a resumed run has to share with the original one, as JSON reads them back."""
    flags = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_ON_RESUME}
    flags |= {"world_size": world_size(), "replaced_defaults": config.replaced_defaults}
    return json.loads(json.dumps(flags))


def _shown(value) -> str:
    """Returns a flag's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _changed(config: RunFlags, saved: dict, record: dict) -> dict[str, str]:
    """Returns flag -> what it was, for flags that differ from those of `saved`, a part of `record`; given ones first.

    A flag does not count if it has the default that the saved run replaced by its own choice (`replaced_defaults`). Of
    models and data the content counts, not the path, unless `record` has no fingerprints.
    """
    same = [saved, saved.get("replaced_defaults", {})]
    now = {name: value for name, value in identity(config).items() if name in saved and name != "replaced_defaults"}
    inputs = record.get("inputs")
    changed = {}
    for name, value in now.items():
        if name in INPUTS:
            was, files = saved[name], config.fingerprints.get(name, {})
            before = (inputs or {}).get(name, {})
            if isinstance(value, list):  # other versions took one value, or numbered the first one, too
                was = [was] if isinstance(was, str) else was
                before = {file.removeprefix("1/"): digest for file, digest in before.items()}
            if inputs is None:
                if _real(was) != _real(value):
                    changed[name] = str(was)
            elif (files or not value) and (found := changes(before, files)):
                changed[name] = found if was == value else f"{_shown(was)}: {found}"
        elif not any(name in x and x[name] == value for x in same):
            changed[name] = str(saved[name])
    return dict(sorted(changed.items(), key=lambda item: item[0] not in config.given))


def _real(value: str | list | None) -> list[str]:
    """Returns the real paths of an input's value or values."""
    return [os.path.realpath(str(path)) for path in (value if isinstance(value, list) else [value]) if path]


def check_folder(config: RunFlags) -> None:
    """Raises UserError if --model_save_path cannot be used. Writes nothing.

    A run that is there may be overwritten (--overwrite), or resumed if it is unfinished and has either checkpoints or
    the same flags.
    """
    path = config.model_save_path
    if holds_run(path) and not config.overwrite and not _can_resume(config):
        if _is_finished(path) and _has_checkpoints(path) and config.resume == "auto":
            raise UserError(
                f"--model_save_path {path} already holds a run, which is finished: to go on to a larger --train_steps, "
                "pass --resume_with_changes; to keep it, use another folder; to replace it, pass --overwrite"
            )
        if _lost_checkpoints(path):
            raise UserError(
                f"--model_save_path {path} holds a run of {read_index(path).last_checkpoint} steps or more, but "
                f"{path}/checkpoints has none of its checkpoints: move them back there and use --resume auto, use "
                "another folder, or pass --overwrite, which removes what is left of the run"
            )
        if _unsaved_best(config):
            raise UserError(
                f"--model_save_path {path} holds best/ of a run without a checkpoint, which starting at step 0 would "
                "remove: move best/ away and repeat the command, use another folder, or pass --overwrite"
            )
        raise UserError(f"--model_save_path {path} already holds a run; use another folder, or pass --overwrite")
    check_owned(path)
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
    return _has_checkpoints(path) or (
        not _lost_checkpoints(path) and _same_config(config) and not _unsaved_best(config)
    )


def _is_finished(path: str) -> bool:
    return os.path.lexists(os.path.join(path, "final", "config.json"))


def _is_inside(checkpoint: str, run: str) -> bool:
    """Whether a path is that of a checkpoint in a run's folder, also by way of links."""
    own = os.path.join(run, "checkpoints", os.path.basename(os.path.abspath(checkpoint)))
    return os.path.exists(checkpoint) and os.path.exists(own) and os.path.samefile(checkpoint, own)


def _has_checkpoints(path: str) -> bool:
    return bool(all_checkpoints(os.path.join(path, "checkpoints")))


def _lost_checkpoints(path: str) -> bool:
    """Whether a run's checkpoints are gone, all of them: its other files would be removed if it started at step 0."""
    return bool(read_index(path).last_checkpoint) and not _has_checkpoints(path)


def _has_best(path: str) -> bool:
    return any(os.path.lexists(os.path.join(path, name, "config.json")) for name in ("best", f"best{ASIDE}"))


def _unsaved_best(config: RunFlags) -> bool:
    """Whether the folder holds best/ of an unfinished run whose checkpoints all failed: the first is complete one step
    after --checkpoint_per_step.
    """
    path, every = config.model_save_path, config.checkpoint_per_step
    unsaved = every and not _has_checkpoints(path) and not _is_finished(path) and _steps_done(path) > every + 1
    return bool(unsaved) and config.resume == "auto" and _has_best(path)


def _steps_done(path: str) -> int:
    """Returns the number of a run's lines in its metrics."""
    if not os.path.exists(file := os.path.join(path, LINES[0])):
        return 0
    with open_regular(file) as lines:
        return sum(parse_row(line) is not None for line in lines)


def _same_config(config: RunFlags) -> bool:
    """Whether the run in the folder began with the same flags and content. Raises UserError that names a difference."""
    path = config.model_save_path
    try:
        saved = read_json(os.path.join(path, "config.json"), kind=SavedFlags)
        changed = _changed(config, saved, saved) if identity(config).keys() <= saved.keys() else None
    except (OSError, ValueError):
        return False
    for name, was in (changed or {}).items():
        if name not in SPLIT:
            began = f"which began with another --{name} ({was})"
            raise UserError(
                f"--model_save_path {path} already holds a run, {began}; use another folder, or --overwrite"
            )
    return changed is not None


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
        if not config.resume_with_changes:
            keep_sizes(config, checkpoint.state["flags"])
        say(f"resuming from {checkpoint.path}")
        path = config.model_save_path
        if _is_finished(path):
            say(f"warning: {path}/final is removed; steps after {checkpoint.step} run again")
    return checkpoint


def _check_flags(checkpoint: Checkpoint, config: RunFlags, say: Say) -> None:
    now = identity(config)
    changed = _changed(config, checkpoint.state["flags"], checkpoint.state)
    if "inputs" not in checkpoint.state:
        say(f"{checkpoint.path} has no fingerprints: of models and data only the paths were compared, not the content")
    for name, was in changed.items():
        wanted = _shown(now[name])
        if name in SPLIT:
            what = "number of processes" if name == "world_size" else f"--{name}"
            say(f"resumed with another {what}: {wanted}, not {was}; only rounding and dropout differ")
            continue
        if not config.resume_with_changes:
            old = "the same files" if name in INPUTS else "that value"
            more = ", ".join(f"--{other}" for other in changed if other not in (name, *SPLIT))
            raise UserError(
                f"--{name} {wanted} differs from {checkpoint.path} ({was})"
                f"{more and f', and so does {more}'}; use {old}, or pass "
                "--resume_with_changes to resume anyway, or --overwrite to start at step 0"
            )
        say(f"resumed with another --{name}: {wanted}, not {was}")


def begin_folder(config: RunFlags, checkpoint: Checkpoint | None) -> int:
    """Prepares the run's folder, prints the flags, and returns the number of steps already done. Collective."""
    own = checkpoint is not None and _is_inside(checkpoint.path, config.model_save_path)
    if is_main() and not checkpoint and not config.overwrite:
        _warn_of_unsaved(config.model_save_path)
    prepare_run_folder(config.model_save_path, config, checkpoint.step if own else 0)
    if is_main():
        where = f"{config.model_save_path}/config.json"
        print(f"all flags: {where}; flags that differ from their defaults:\n  {changed_flags(config)}", flush=True)
    return checkpoint.step if checkpoint else 0


def _warn_of_unsaved(path: str) -> None:
    """Prints what is removed of an attempt without a checkpoint."""
    steps = _steps_done(path)
    if steps or _has_best(path):
        what = f"{steps} step{'s' * (steps != 1)}{' and best/' if _has_best(path) else ''}"
        print(
            f"warning: {path} holds {what} without a checkpoint; they are removed and the run starts at step 0",
            flush=True,
        )


def inputs_of(config) -> list[str | None]:
    """Returns the paths of models and data that a run reads, with those of the models that adapters belong to."""
    given = [getattr(config, name) for name in INPUTS if hasattr(config, name)]
    found = [path for paths in given for path in (paths if isinstance(paths, list) else [paths])]
    adapters = [path for path in found if path and is_adapter(Path(path))]
    below = [chain(path, "--model_save_path", lambda name, _: Path(name)) for path in adapters]
    return found + [str(folder) for folders in below for _, folder, _ in folders]


def check_outputs(config) -> None:
    """Raises UserError if --model_save_path, --logdir or a tracker of --report_to cannot be used. Writes nothing."""
    check_folder(config)
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
