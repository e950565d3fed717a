"""Fingerprints of what a run reads: the SHA-256 of every file of its models, its data and --reward_fn.

Ranks of a node share the hashing. Hashes of large files are cached by real path, size, times and inode.
"""

import contextlib
import hashlib
import json
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from utils.data_files import is_saved, is_weight, parts_of_name, saved_files, split_files
from utils.distributed import gather_objects, rank
from utils.errors import Say, UserError
from utils.files import first_names, read_json, remove, sha256, write_json
from utils.hub import data_revision, download, download_model, downloaded, is_hub_id
from utils.models.adapter_folder import CONFIG, WEIGHTS, chain
from utils.models.weight_files import shards_of, weight_file
from utils.run.together import once_per_node, together
from utils.schema import Schema, Sha256, checked
from utils.tokenizer_files import FILES as TOKENIZER_JSON

CODE = ("data", "ppo", "reward", "sft", "utils")  # folders beside train_ppo.py
MIN_CACHED = 1 << 20  # bytes; smaller files are hashed again in less time than the cache would save
MAX_CACHED = 5000  # entries
MIN_AGE = 2 * 10**9  # nanoseconds: a file that changed more recently may change again without another time of change
NAMES = ("config.json", "generation_config.json", *TOKENIZER_JSON, "vocab.txt", "merges.txt")  # read beside weights
PATTERNS = ("*.jinja", "*.model", "*.tiktoken", "additional_chat_templates/*")
THREADS = 4  # per rank
ANNOUNCED = 1 << 30  # bytes to hash from which on a line says so

Files = dict[str, Path | str]  # name -> file, or a text that stands for content


class _Cache(Schema):
    sha256: dict[str, Sha256]


class Stamp(NamedTuple):
    """A file's place and state. With the same stamp it has the same content. Times are in nanoseconds."""

    node: str
    path: str
    size: int
    modified: int
    changed: int
    inode: int


def _model(path: str, flag: str) -> Files:
    (_, folder, flag), *adapters = chain(path, flag, local_folder)
    file = weight_file(folder)
    shards = shards_of(file, flag).values() if file and file.suffix == ".json" else ()
    files = _text_files(folder) | {name: folder / name for name in ([file.name, *shards] if file else ())}
    for number, (_, place, _) in enumerate(adapters, 1):
        own = _text_files(place) | {name: place / name for name in (CONFIG, WEIGHTS)}
        files |= {f"adapter {number}/{name}": file for name, file in own.items()}
    return files


def local_folder(path: str, flag: str) -> Path:
    """Returns the folder of a model, downloaded if it is a hub id."""
    return download_model(path, flag) if is_hub_id(path) else Path(path)


def _text_files(folder: Path) -> Files:
    """Returns configs, tokenizer and templates of a model; not its README, notes and other tools' JSON."""
    files = [file for pattern in PATTERNS for file in folder.glob(pattern)]
    return {str(file.relative_to(folder)): file for file in files} | {name: folder / name for name in NAMES}


def _tokenizer(path: str, flag: str) -> Files:
    place = Path(path)
    if is_hub_id(path):
        place = download(path, flag, allow_patterns=["*.json", "*.model", "*.txt", "*.jinja"])
    if not place.is_file():
        return _text_files(place)
    beside = ("tokenizer_config.json", "added_tokens.json", "chat_template.jinja")
    return {"tokenizer.model": place} | {name: place.parent / name for name in beside}


def _data(value: str, flag: str, split: str = "train", valid_split: str = "") -> Files:
    if is_weight(value):
        return {"the weight": value}
    path, config, chosen = parts_of_name(value)
    named = {"the configuration": config, "the split": chosen}
    files = {name: text for name, text in named.items() if text}
    if os.path.isdir(path):
        return files | {
            os.path.relpath(file, path): Path(file) for file in _data_files(path, chosen or split, valid_split)
        }
    if is_hub_id(path):
        return files | {"the revision": data_revision(path, config)}
    return files | {f"the {Path(path).suffix} file": Path(path)}


def _data_files(folder: str, split: str, valid_split: str) -> list[str | Path]:
    """Returns the files that are read of a folder; all of one that `datasets` saved."""
    splits = saved_files(folder).values() if is_saved(folder) else split_files(Path(folder), split, valid_split)
    return [file for files in splits for file in files]


def _function(spec: str, flag: str) -> Files:
    path, _, name = spec.rpartition(":")
    return {"the function": name, "the file": Path(path)}


def _estimator(spec: str, flag: str) -> Files:
    return _function(spec, flag) if ":" in spec else {"the estimator": spec}


# Flag -> function that lists the files which are read for a value of it.
INPUTS: dict[str, Callable[..., Files]] = {
    "policy_model_path": _model, "critic_model_path": _model, "reward_model_path": _model,
    "hf_model_name_or_path": _model, "tokenizer_name_or_path": _tokenizer, "reward_tokenizer_name_or_path": _tokenizer,
    "data_path": _data, "center_data_path": _data, "ppo_pretrain_data_path": _data, "reward_fn": _function,
    "advantage_estimator": _estimator,
}  # fmt: skip


def _files_of(flag: str, value: str, *splits: str) -> Files:
    """Returns the regular files of one value; none if it cannot be read, which its loader explains later."""
    try:
        files = INPUTS[flag](value, f"--{flag}", *splits)
    except (OSError, ValueError, KeyError, AttributeError):  # ValueError includes UserError
        return {}
    files = {name: file for name, file in files.items() if isinstance(file, str) or _can_be_read(file)}
    return {name.encode(errors="backslashreplace").decode(): file for name, file in files.items()}  # of any encoding


def _can_be_read(file: Path) -> bool:
    """Whether it is a regular file, and none that is nearly all holes, which could be of any size."""
    return os.path.isfile(file) and (state := file.stat()).st_size <= max(MIN_CACHED, 8 * 512 * state.st_blocks)


def fingerprints(config, say: Say) -> dict[str, dict[str, str]]:
    """Returns flag -> file name -> SHA-256 of this rank's inputs. Collective.

    Names of the second and later values of a flag start with the number of the value.
    """
    downloaded.update(once_per_node(lambda: _download(config)))
    found = _list(config)
    known = _hash_all({stamp for stamp in found.values() if isinstance(stamp, Stamp)}, say)
    result = defaultdict(dict)
    for (flag, name), stamp in found.items():
        result[flag][name] = known.get(stamp, stamp)
    return dict(result)


def _download(config) -> dict:
    """Lists the inputs, which downloads those that are hub ids. Returns where they are."""
    _list(config)
    return downloaded


def _list(config) -> dict[tuple[str, str], Stamp | str]:
    """Returns (flag, name) -> stamp, or a text that stands for content."""
    found = {}
    for flag in INPUTS:
        value = getattr(config, flag, None) or []
        splits = (config.split, config.valid_split) if INPUTS[flag] is _data else ()
        i = 0
        for path in value if isinstance(value, list) else [value]:
            i += not (INPUTS[flag] is _data and is_weight(path))
            for name, file in _files_of(flag, path, *splits).items():
                numbered = f"{i}/{name}" if i > 1 else name
                found[flag, numbered] = file if isinstance(file, str) else _stamp(file)
    return found


def changes(before: dict[str, str], now: dict[str, str]) -> str:
    """Returns what has changed between two fingerprints of a flag, "a.json has other content, b.json is new"; or ""."""
    words = [f"{name} has other content" for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    words += [f"{name} is missing" for name in sorted(before.keys() - now.keys())]
    return first_names(words + [f"{name} is new" for name in sorted(now.keys() - before.keys())])


def code_files() -> dict[str, str]:
    """Returns file name -> SHA-256 of the toolkit's own code, which the git commit does not show if it was edited."""
    root = Path(__file__).parents[2]
    files = [*root.glob("*.py"), *(file for folder in CODE for file in (root / folder).rglob("*.py"))]
    return {str(file.relative_to(root)): sha256(file) for file in sorted(files)}


def digest_of(value) -> str:
    """Returns the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _stamp(file: str | Path) -> Stamp:
    path = os.path.realpath(file)
    state = os.stat(path)
    return Stamp(socket.gethostname(), path, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


def _hash_all(stamps: set[Stamp], say: Say) -> dict[Stamp, str]:
    """Returns the SHA-256 of all ranks' files. Each file is hashed by one rank of its node, unless it is cached."""
    cache = _read_cache()
    nodes = gather_objects(socket.gethostname())
    everyone = gather_objects({stamp: cache.get(_key(stamp)) for stamp in stamps})
    known = {stamp: digest for found in everyone for stamp, digest in found.items() if digest}
    load, own = Counter(), []
    for stamp in sorted(set().union(*everyone) - known.keys(), key=lambda stamp: (-stamp.size, stamp)):
        owner = min((r for r, found in enumerate(everyone) if stamp in found), key=lambda r: (load[r], r))
        load[owner] += stamp.size
        if owner == rank():
            own.append(stamp)
    if load.total() >= ANNOUNCED:
        say(f"hashing {load.total() / 1e9:.1f} GB of models and data; later runs reuse the hashes of unchanged files")
    with together(), ThreadPoolExecutor(THREADS) as pool:  # one rank may take long
        hashed = dict(zip(own, pool.map(_hash, own), strict=True))
    shares = gather_objects(hashed)
    new = {stamp: found for share in shares for stamp, found in share.items()}
    if rank() == nodes.index(nodes[rank()]):  # the first of its node; nodes may share one home
        _write_cache({_key(stamp): digest for stamp, (digest, keep) in new.items() if keep})
    return known | {stamp: digest for stamp, (digest, _) in new.items()}


def _key(stamp: Stamp) -> str:
    """Returns the cache's key; without the node, since container names change from run to run."""
    return json.dumps(stamp[1:])


def _hash(stamp: Stamp) -> tuple[str, bool]:
    """Returns (SHA-256 of a file, whether the cache may keep it: it is large and was not being changed)."""
    settled = time.time_ns() - max(stamp.modified, stamp.changed) > MIN_AGE
    try:
        digest = sha256(stamp.path)
        return digest, settled and stamp.size >= MIN_CACHED and _stamp(stamp.path) == stamp
    except OSError as error:
        return f"not readable ({error.strerror})", False


def known_sha256(files: list[str]) -> list[str]:
    """Returns the SHA-256 of each file, from the cache for those that have not changed since. Raises OSError."""
    cache = _read_cache()
    return [cache.get(_key(_stamp(file))) or sha256(file) for file in files]


def cache_folder() -> str:
    """Returns this user's folder for what later runs can use; "" if there is none."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(folder, "ppo-max") if os.path.isabs(folder) else ""


def _cache_path() -> str:
    """Returns the file of the hashes; "" if this user has no folder for it."""
    folder = cache_folder()
    return folder and os.path.join(folder, "sha256.json")


def _read_cache() -> dict[str, str]:
    path = _cache_path()
    with contextlib.suppress(OSError, ValueError):
        if os.path.isfile(path):
            return checked(_Cache, read_json(path)).sha256
    return {}


def _write_cache(new: dict[str, str]) -> None:
    """Adds entries. A cache that cannot be written is no error. The newest MAX_CACHED entries stay."""
    path = _cache_path()
    if not new or not path:
        return
    own = f"{path}.{socket.gethostname()}.{os.getpid()}"  # of this process alone, which nodes with one home need
    with contextlib.suppress(OSError, UserError):
        entries = list((_read_cache() | new).items())[-MAX_CACHED:]
        write_json(own, {"sha256": dict(entries)})
        try:
            os.replace(own, path)
        finally:
            remove(own)
