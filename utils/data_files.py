"""Data sets by name and on the disk: hub ids, endings, *train* and *valid* files, folders that `datasets` saved."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import read_json
from utils.hub import is_hub_id

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_NAME = re.compile(r"([^:@]+)(?::([\w.-]+))?(?:@(.+))?")  # owner/name:config@split
_WEIGHT = re.compile(r"-?\d+(\.\d*)?([eE][-+]?\d+)?|-?\.\d+")
MIN_SHARE = 1 / 1000  # of the sum of all weights
_STATE = "state.json"  # in each folder of a saved data set


@dataclass(frozen=True)
class Source:
    """One value of a data flag: a folder, a file or a hub id with configuration and split, and the number after it."""

    path: str
    config: str | None = None
    split: str | None = None
    weight: float | None = None


def parse_sources(values: list[str], flag: str = "--data_path") -> list[Source]:
    """Returns the sources in values such as ["a", "0.7", "b", "0.3"]. Raises UserError for wrong or missing weights."""
    sources: list[Source] = []
    for value in values:
        if not is_weight(value):
            sources.append(Source(*parts_of_name(value)))
        elif not sources or sources[-1].weight is not None:
            raise UserError(f"{flag} {value}: a weight follows the path that it is of; write ./{value} for a file")
        else:
            sources[-1] = Source(sources[-1].path, sources[-1].config, sources[-1].split, float(value))
    weights = [source.weight for source in sources]
    if all(weight is None for weight in weights):
        return sources
    if None in weights:
        raise UserError(
            f"{flag}: {sources[weights.index(None)].path} has no weight, unlike others; give each one or none"
        )
    for weight in weights:
        if not weight >= MIN_SHARE * sum(weights) > 0 or not math.isfinite(weight):
            raise UserError(f"{flag}: weight {weight:g}: pass positive numbers, none below 1/1000 of their sum")
    return sources


def is_weight(value: str) -> bool:
    """Whether a value of a data flag is a number, the weight of the path before it. A file of this name is ./7."""
    return bool(_WEIGHT.fullmatch(value))


def parts_of_name(value: str) -> tuple[str, str | None, str | None]:
    """Returns (path or hub id, configuration, split) of a value such as owner/name:config@split."""
    found = None if os.path.exists(value) else _NAME.fullmatch(value)
    if found and (os.path.exists(found[1]) or is_hub_id(found[1])):
        return found[1], found[2], found[3]
    return value, None, None


def suffix_of(file: str | Path) -> str:
    """Returns the ending that tells the format, in lower case, without that of a compression: .jsonl of a.jsonl.gz."""
    return Path(_without_compression(os.path.basename(file))).suffix.lower()


def stem_of(file: str | Path) -> str:
    """Returns the file's name without the endings of format and compression."""
    return Path(_without_compression(os.path.basename(file))).stem


def _without_compression(name: str) -> str:
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in COMPRESSED else name


def split_files(folder: Path, split: str = "train", valid_split: str = "") -> tuple[list[Path], list[Path]]:
    """Returns the (training, held-out) files of a folder: data files whose name ends in the word before its endings.

    Files of a hub data set, such as data/train-00000-of-00002.parquet, begin with it. valid_split: "": valid or
    validation.
    """
    files = [file for file in sorted(folder.iterdir()) if suffix_of(file) in SUFFIXES]
    found = [file for file in files if stem_of(file).endswith(split)]
    names = (valid_split,) if valid_split else ("valid", "validation")
    if not found:  # a snapshot of a hub data set
        inner = folder / "data" if (folder / "data").is_dir() else folder
        files = [file for file in sorted(inner.iterdir()) if suffix_of(file) in SUFFIXES]
        found = [file for file in files if stem_of(file).startswith(f"{split}-")]
        names = tuple(f"{name}-" for name in ((valid_split,) if valid_split else ("validation", "valid")))
        return found, [file for file in files if stem_of(file).startswith(names)]
    return found, [file for file in files if stem_of(file).endswith(names)]


def is_saved(folder: str | Path) -> bool:
    """Whether a folder was written by `datasets` with save_to_disk."""
    return any((Path(folder) / name).is_file() for name in (_STATE, "dataset_dict.json"))


def saved_files(folder: str | Path) -> dict[str, list[str]]:
    """Returns split -> its .arrow files, in order, of a folder that `datasets` saved; "" for one without splits.

    Raises OSError and ValueError if one of the lists of files is damaged.
    """
    root = Path(folder)
    if (root / _STATE).is_file():
        folders = {"": root}
    else:
        folders = {str(split): root / str(split) for split in read_json(root / "dataset_dict.json").get("splits", [])}
    found = {}
    for split, place in folders.items():
        listed = read_json(place / _STATE).get("_data_files", [])
        found[split] = [str(place / os.path.basename(str(each["filename"]))) for each in listed]
    return found
