"""Compares what all ranks start with: flags, versions, code, and the content of models and data."""

import dataclasses
import os

from utils.distributed import gather_objects
from utils.errors import UserError
from utils.files import first_names
from utils.flags.run import RunFlags
from utils.run.fingerprints import INPUTS, changes, code_files, digest_of
from utils.run.folder import versions

# Flags that only rank 0 uses, or each for itself.
_FREE = (
    "logdir", "report_to", "project", "run_name", "notify_url", "log_every", "ignore_hangup", "data_cache",
    "data_workers",
)  # fmt: skip
# Flags whose default may be lowered later on, unlike the same value from the user.
_LOWERED = (
    "warmup_steps", "batch_size", "num_rollouts", "maxlen_prompt", "maxlen_res", "context_truncate", "num_valid",
    "num_eval_prompts",
)  # fmt: skip
Facts = dict[str, str | dict[str, str]]  # what is compared -> its value, or file name -> SHA-256


def check_ranks(config: RunFlags) -> None:
    """Raises UserError on all ranks if one differs from rank 0 in what decides a run's numbers. Collective.

    Inputs may have other paths, such as local copies on each node, as long as their content is the same.
    """
    own = _facts(config)
    if len(set(gather_objects(digest_of(own)))) == 1:
        return
    first, *others = gather_objects(own)
    differ = {rank: found for rank, facts in enumerate(others, 1) if (found := _differences(first, facts))}
    (rank, found), *more = differ.items()
    also = f" (and so do ranks {first_names([str(other) for other, _ in more])})" if more else ""
    raise UserError(
        f"rank {rank} differs from rank 0{also}: {'; '.join(found)}. Start all ranks with the same flags, packages, "
        "code, models and data"
    )


def _facts(config: RunFlags) -> Facts:
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in (*INPUTS, *_FREE)}
    flags["model_save_path"] = os.path.abspath(config.model_save_path)  # all ranks write to it
    defaults = {name for name in _LOWERED if name not in config.given}
    flags = {name: f"{value}{' (not given)' * (name in defaults)}" for name, value in flags.items()}
    facts = flags | config.fingerprints
    return {f"--{name}": value for name, value in facts.items()} | versions() | {"code": code_files()}


def _differences(first: Facts, other: Facts) -> list[str]:
    """Returns one text per fact in which a rank differs from the first."""
    found = []
    for name in sorted(first.keys() | other.keys()):
        was, now = first.get(name, {}), other.get(name, {})
        if isinstance(was, dict) and isinstance(now, dict):
            found += [f"{name}: {what}"] if (what := changes(was, now)) else []
        elif was != now:
            found.append(f"{name} {now or 'missing'}, not {was or 'there'}")
    return found
