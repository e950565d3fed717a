"""Finds checkpoints, tells whole ones from damaged ones, and goes on from them."""

import json
import os
from dataclasses import dataclass
from glob import escape, glob

from utils.distributed import barrier, gather_objects, rank, world_size
from utils.engine.sharded_files import SharedState
from utils.errors import UserError
from utils.run.checkpoint import MANIFEST, Engines, Say, all_checkpoints, first_problem, sha256
from utils.run.random_state import set_random_state


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole. `state`: what `save` was given."""

    path: str
    state: dict

    @property
    def step(self) -> int:
        """Steps that the run had made."""
        return self.state["step"]


def newest(folder: str, say: Say) -> Checkpoint | None:
    """The newest whole checkpoint in a folder; None when there are none at all. Collective.

    A damaged one is named and passed over; when all are damaged, UserError: nobody loses days of work to a silent
    start from nothing.
    """
    found = gather_objects(all_checkpoints(folder))[0]
    for _, path in found:
        problem = first_problem(_damage(path))
        if not problem:
            return Checkpoint(path, _read_json(os.path.join(path, "state.json")))
        say(f"warning: {path} is damaged ({problem}); looking for an older one")
    if found:
        raise UserError(f"{folder} has no whole checkpoint left: start anew with --overwrite")
    return None


def named(path: str) -> Checkpoint:
    """The checkpoint in the folder that --resume names; UserError when it is none or damaged. Collective."""
    path = os.path.abspath(path)
    problem = first_problem("not a folder" if not os.path.isdir(path) else _damage(path))
    if problem:
        raise UserError(f"--resume {path} is not a whole checkpoint ({problem}): give another .../checkpoints/step_N")
    return Checkpoint(path, _read_json(os.path.join(path, "state.json")))


def _damage(path: str) -> str | None:
    """What is wrong with a checkpoint, as far as this rank looks: every file's size, its share of the hashes."""
    try:
        manifest = _read_json(os.path.join(path, MANIFEST))
        for i, (name, entry) in enumerate(sorted(manifest.items())):
            file = os.path.join(path, os.path.basename(name))
            if os.path.getsize(file) != entry["bytes"]:
                return f"{name} has {os.path.getsize(file)} bytes, not {entry['bytes']}"
            if i % world_size() == rank() and sha256(file) != entry["sha256"]:
                return f"{name} is not what was written: its hash differs"
        return None if "state.json" in manifest else f"{MANIFEST} names no state.json"
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except OSError as error:
        return f"{os.path.basename(error.filename or path)} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is not a manifest"


def _read_json(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def restore(checkpoint: Checkpoint, engines: Engines) -> None:
    """Engines and random streams as they were; a rank more than there were keeps the streams it has. Collective.

    Raises UserError when the engines are of other models.
    """
    for name, engine in engines.items():
        files = sorted(glob(os.path.join(escape(checkpoint.path), f"{name}-rank*.safetensors")))
        try:
            engine.load_state(SharedState(files))
        except KeyError as error:
            raise UserError(f"{checkpoint.path} does not fit the {name} of these flags: {error.args[0]}") from None
    streams = os.path.join(checkpoint.path, f"random-rank{rank()}.json")
    if os.path.exists(streams):
        set_random_state(_read_json(streams))
    barrier()
