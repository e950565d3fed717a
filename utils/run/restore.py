"""Finds intact checkpoints and restores engines and random streams from them."""

import os
from dataclasses import dataclass
from glob import escape, glob

from utils.distributed import barrier, gather_objects, rank, world_size
from utils.engine.state import SharedState
from utils.errors import Say, UserError
from utils.files import read_json
from utils.run.checkpoint import MANIFEST, Engines, all_checkpoints, first_problem, sha256
from utils.run.random_state import set_random_state


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint. state: the argument of `CheckpointWriter.save`."""

    path: str
    state: dict

    @property
    def step(self) -> int:
        """Number of steps before the checkpoint."""
        return self.state["step"]


def newest(folder: str, say: Say) -> Checkpoint | None:
    """Returns a folder's newest intact checkpoint, or None. Raises UserError if all are damaged. Collective."""
    found = gather_objects(all_checkpoints(folder))[0]
    for _, path in found:
        problem = first_problem(_damage(path))
        if not problem:
            return _read(path)
        say(f"warning: {path} is damaged ({problem}); trying an older one")
    if found:
        raise UserError(f"all checkpoints in {folder} are damaged; pass --overwrite to start at step 0")
    return None


def named(path: str) -> Checkpoint:
    """Returns the checkpoint in the folder that --resume names. Raises UserError if it is damaged. Collective."""
    path = os.path.abspath(path)
    problem = first_problem("not a folder" if not os.path.isdir(path) else _damage(path))
    if problem:
        raise UserError(f"--resume {path} is not an intact checkpoint ({problem}); pass another .../checkpoints/step_N")
    return _read(path)


def _read(path: str) -> Checkpoint:
    return Checkpoint(path, read_json(os.path.join(path, "state.json")))


def _damage(path: str) -> str | None:
    """Returns what is wrong with a checkpoint, or None. Checks all sizes, and this rank's share of the hashes."""
    try:
        manifest = read_json(os.path.join(path, MANIFEST))
        for i, (name, entry) in enumerate(sorted(manifest.items())):
            file = os.path.join(path, os.path.basename(name))
            if os.path.getsize(file) != entry["bytes"]:
                return f"{name} has {os.path.getsize(file)} bytes, not {entry['bytes']}"
            if i % world_size() == rank() and sha256(file) != entry["sha256"]:
                return f"{name} does not match its SHA-256"
        return None if "state.json" in manifest else f"{MANIFEST} names no state.json"
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except OSError as error:
        return f"{os.path.basename(error.filename or path)} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is not a manifest"


def restore(checkpoint: Checkpoint, engines: Engines) -> None:
    """Restores engines and random streams; a rank without streams in the checkpoint keeps its own. Collective."""
    for name, engine in engines.items():
        files = sorted(glob(os.path.join(escape(checkpoint.path), f"{name}-rank*.safetensors")))
        try:
            engine.load_state(SharedState(files))
        except KeyError as error:
            raise UserError(f"{checkpoint.path} does not fit the {name} of these flags: {error.args[0]}") from None
    streams = os.path.join(checkpoint.path, f"random-rank{rank()}.json")
    if os.path.exists(streams):
        set_random_state(read_json(streams))
    barrier()
