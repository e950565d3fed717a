"""Finds intact checkpoints and restores engines and random streams from them."""

import os
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, RootModel, model_validator
from safetensors import SafetensorError

from utils.distributed import barrier, gather_objects, rank, world_size
from utils.engine.average import WeightAverage
from utils.engine.state import SharedState
from utils.errors import Say, UserError
from utils.files import read_json, sha256
from utils.run.checkpoint import MANIFEST, Engines, all_checkpoints, first_problem
from utils.run.random_state import check_random_state, set_random_state
from utils.schema import Count, Schema, Sha256

_ENGINE_FILE = re.compile(r"(\w+)-rank[0-9]+\.safetensors")
_FileName = Annotated[str, Field(pattern=rf"^(state\.json|random-rank[0-9]+\.json|{_ENGINE_FILE.pattern})$")]


Fingerprints = dict[str, dict[str, str]]  # flag -> file name -> SHA-256
Best = Annotated[float, Field(allow_inf_nan=True, lt=float("inf"))]  # an evaluation; -inf is worse than any


class _Entry(Schema):
    bytes: Count
    sha256: Sha256


class _Manifest(RootModel):
    root: dict[_FileName, _Entry]


class SavedFlags(Schema):
    """The flags of a run that resuming relies on. Others are compared with those of the command line."""

    world_size: Annotated[int, Field(ge=1)]
    train_steps: Count
    critic_pretrain_steps: Count = 0
    num_rollouts: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 1
    replaced_defaults: dict[str, Any] = Field({})
    inputs: Fingerprints | None = None  # in config.json


class State(Schema):
    """What state.json holds for every caller of `CheckpointWriter.save`."""

    step: Annotated[Count, Field(ge=1)]
    flags: SavedFlags | None = None


class TrainerState(State):
    """What it holds for every trainer; each adds its own numbers."""

    flags: SavedFlags
    inputs: Fingerprints | None = None  # not in those of versions before they had them

    @model_validator(mode="after")
    def _is_in_the_run(self):
        if self.step > self.flags.critic_pretrain_steps + self.flags.train_steps:
            raise ValueError(f"step {self.step} is after the last one of its flags")
        return self


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint. state: the argument of `CheckpointWriter.save`; files: the names in the manifest."""

    path: str
    state: dict
    files: list[str]

    @property
    def step(self) -> int:
        """Number of steps before the checkpoint."""
        return self.state["step"]


def newest(folder: str, say: Say, kind: type[State] = State) -> Checkpoint | None:
    """Returns a folder's newest intact checkpoint, or None. Raises UserError if all are damaged. Collective.

    kind: what state.json has to hold.
    """
    found = gather_objects(all_checkpoints(folder))[0]
    for _, path in found:
        problem = first_problem(_damage(path, kind))
        if not problem:
            return _read(path)
        say(f"warning: {path} is damaged ({problem}); trying an older one")
    if found:
        raise UserError(f"all checkpoints in {folder} are damaged; pass --overwrite to start at step 0")
    return None


def named(path: str, kind: type[State] = State) -> Checkpoint:
    """Returns the checkpoint in the folder that --resume names. Raises UserError if it is damaged. Collective."""
    path = os.path.abspath(path)
    problem = first_problem("not a folder" if not os.path.isdir(path) else _damage(path, kind))
    if problem:
        raise UserError(f"--resume {path} is not an intact checkpoint ({problem}); pass another .../checkpoints/step_N")
    return _read(path)


def _read(path: str) -> Checkpoint:
    state, manifest = (read_json(os.path.join(path, name)) for name in ("state.json", MANIFEST))
    return Checkpoint(path, state, sorted(manifest))


def _damage(path: str, kind: type[State]) -> str | None:
    """Returns what is wrong with a checkpoint, or None. Checks all sizes, and content and hash of this rank's share."""
    try:
        manifest = read_json(os.path.join(path, MANIFEST), kind=_Manifest)
        _check_files(path, manifest)
        _check_content(path, kind, manifest)
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except OSError as error:
        return f"{os.path.basename(error.filename or path)} cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def _check_files(path: str, manifest: dict) -> None:
    for i, (name, entry) in enumerate(sorted(manifest.items())):
        file = os.path.join(path, name)
        if os.path.getsize(file) != entry["bytes"]:
            raise ValueError(f"{name} has {os.path.getsize(file)} bytes, not {entry['bytes']}")
        if not os.path.isfile(file):
            raise ValueError(f"{name} is not a regular file")
        if i % world_size() == rank() and sha256(file) != entry["sha256"]:
            raise ValueError(f"{name} does not match its SHA-256")


def _check_content(path: str, kind: type[State], manifest: dict) -> None:
    if "state.json" not in manifest:
        raise ValueError(f"{MANIFEST} names no state.json")
    state = read_json(os.path.join(path, "state.json"), kind=kind)
    of_folder = re.fullmatch(r"step_([0-9]+)", os.path.basename(path))
    if of_folder and int(of_folder[1]) != state["step"]:
        raise ValueError(f"state.json is of step {state['step']}")
    for i in range((state.get("flags") or {}).get("world_size", 0)):
        if (name := f"random-rank{i}.json") not in manifest:
            raise ValueError(f"{MANIFEST} names no {name}")
        if i % world_size() == rank():
            check_random_state(read_json(os.path.join(path, name)), name)
    engines = {match[1] for match in map(_ENGINE_FILE.fullmatch, manifest) if match}
    for i, name in enumerate(sorted(engines)):
        if i % world_size() == rank():
            try:
                SharedState(_files_of(name, path, list(manifest)))
            except (ValueError, SafetensorError) as error:
                raise ValueError(f"{name}: {error}") from None


def _files_of(engine: str, path: str, names: list[str]) -> list[str]:
    matches = map(_ENGINE_FILE.fullmatch, sorted(names))
    return [os.path.join(path, match[0]) for match in matches if match and match[1] == engine]


def saved_weights(path: str, engine: str) -> SharedState:
    """Returns an engine's float32 weights in a checkpoint, of any ZeRO stage; only what is asked for is read.

    Raises UserError if there are none. Hashes are not compared.
    """
    try:
        return SharedState(_files_of(engine, path, os.listdir(path)))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({engine}: {error}); remove it, or copy it again") from None


def restore(checkpoint: Checkpoint, engines: Engines) -> None:
    """Restores engines and random streams; a rank without streams in the checkpoint keeps its own. Collective.

    An average that the run has only since it was resumed starts at the restored weights.
    """
    for name, engine in engines.items():
        files = _files_of(name, checkpoint.path, checkpoint.files)
        try:
            if not files and isinstance(engine, WeightAverage):
                engine.load_state(None)
            else:
                engine.load_state(SharedState(files))
        except KeyError as error:
            raise UserError(f"{checkpoint.path} does not fit the {name} of these flags: {error.args[0]}") from None
        except ValueError as error:
            raise UserError(f"{checkpoint.path} is damaged ({name}: {error}); remove it to use an older one") from None
    streams = f"random-rank{rank()}.json"
    if streams in checkpoint.files:
        set_random_state(read_json(os.path.join(checkpoint.path, streams)))
    barrier()
