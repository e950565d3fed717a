"""Time that fingerprints and the comparison of ranks add to a start, for the 13 GB of a 7B model in bf16.

    python benchmarks/fingerprints.py [--gb 13] [--folder /tmp]

Three files of random bytes, removed afterwards. Cold: neither the hashes nor the files are cached (posix_fadvise).
Warm: the files are in the page cache. Cached: the hashes are known. On one process and on two ranks of a node. The
first line is the time to read the files from the disk, without hashing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PIECE = 1 << 26  # bytes
NAMES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
RANK = """
import sys, time
from sft.config import SFTConfig
from utils.engine.engine import init_distributed, shutdown_distributed
from utils.run.fingerprints import fingerprints
from utils.run.compare_ranks import check_ranks
init_distributed()
config = SFTConfig(hf_model_name_or_path=sys.argv[1], data_path=[sys.argv[1] + "/train.json"])
start = time.perf_counter()
config.fingerprints = fingerprints(config, lambda text: None)
check_ranks(config)
print(time.perf_counter() - start, flush=True)
shutdown_distributed()
"""


def make(folder: Path, size: int) -> None:
    """Writes the shards of a model, its config and some data."""
    for name in NAMES:
        with open(folder / name, "wb") as file:
            for _ in range(size // len(NAMES) // PIECE):
                file.write(os.urandom(PIECE))
            os.fsync(file.fileno())
    weights = ", ".join(f'"{i}": "{name}"' for i, name in enumerate(NAMES))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weights}}}}}')
    for name in ("config.json", "train.json"):
        (folder / name).write_text("{}")
    time.sleep(3)  # files that have just changed are not cached


def drop_pages(folder: Path) -> None:
    """Removes the files from the page cache, so that they are read from the disk."""
    for name in NAMES:
        with open(folder / name, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> float:
    """Returns the seconds in which the files can be read, one after the other."""
    start = time.perf_counter()
    for name in NAMES:
        with open(folder / name, "rb", buffering=0) as file:
            while file.read(PIECE):
                pass
    return time.perf_counter() - start


def seconds(folder: Path, cache: Path, ranks: int, port: int) -> float:
    """Returns the longest time of the ranks, imports and joining the group excluded."""
    processes = []
    for rank in range(ranks):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
        group |= {"MASTER_ADDR": "127.0.0.1", "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", RANK, str(folder)]
        processes.append(subprocess.Popen(command, env=os.environ | group, stdout=subprocess.PIPE, text=True))
    return max(float(process.communicate()[0].split()[-1]) for process in processes)


def main() -> None:
    """Prints one line per number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=13.0)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    options = parser.parse_args()
    from utils.launcher import free_port

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, hashes = Path(name) / "model", Path(name) / "hashes"
        folder.mkdir()
        make(folder, int(options.gb * 1e9))
        drop_pages(folder)
        print(f"read: {read_all(folder):.2f} s", flush=True)
        for ranks in (1, 2):
            times = []
            for case in ("cold", "warm", "cached"):
                if case == "cold":
                    drop_pages(folder)
                hashed = hashes / f"{ranks}{'cold' * (case == 'cold')}"
                times.append(f"{case} {seconds(folder, hashed, ranks, free_port()):.2f} s")
            print(f"{ranks} process{'es' * (ranks > 1)}, {options.gb:g} GB: {', '.join(times)}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
