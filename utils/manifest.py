"""`weight_manifest.json` beside weights: SHA-256 of every tensor, and what all parameters add up to."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.errors import UserError
from utils.tensor_files import DTYPES, read_json

FILE = "weight_manifest.json"


@dataclass(frozen=True)
class Hashes:
    """SHA-256, in hexadecimal, of each tensor's bytes in `dtype` (row-major, little-endian)."""

    dtype: str
    sha256: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """total: sum of the recovered model (see utils.weight_diff.recover). raw, diff: only in the folder of a diff."""

    total: float
    tuned: Hashes
    raw: Hashes | None = None
    diff: Hashes | None = None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `weight_manifest.json`."""
    content = {key: value for key, value in asdict(manifest).items() if value is not None}
    (folder / FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_manifest(folder: Path, flag: str) -> Manifest | None:
    """The folder's manifest, None where it has none. Raises UserError for one that is damaged."""
    if not (folder / FILE).is_file():
        return None
    content = read_json(folder / FILE, flag)
    try:
        parts = {part: _hashes(content[part]) for part in ("raw", "diff", "tuned") if part in content}
        return Manifest(float(content["total"]), **parts)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{flag}: {folder / FILE} is damaged ({error}); copy it again") from error


def _hashes(content: dict) -> Hashes:
    if content["dtype"] not in DTYPES:
        raise ValueError(f"dtype {content['dtype']}")
    return Hashes(content["dtype"], dict(content["sha256"]))


class TensorHasher:
    """Hashes tensors that pass by in pieces, and compares each with `expected` where that is given.

    mismatch: the message of the UserError when one differs, with {} for its name.
    """

    def __init__(self, expected: dict[str, str] | None = None, mismatch: str = "{}"):
        self.found: dict[str, str] = {}
        self._expected = expected
        self._mismatch = mismatch
        self._running = hashlib.sha256()

    def add(self, name: str, data: memoryview, last: bool) -> None:
        """The next piece of tensor `name`; `last` ends it."""
        self._running.update(data)
        if not last:
            return
        self.found[name] = self._running.hexdigest()
        self._running = hashlib.sha256()
        if self._expected is not None and self._expected.get(name) != self.found[name]:
            raise UserError(self._mismatch.format(name))
