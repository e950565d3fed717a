"""Functions that run in processes of their own, which have imported vLLM, and give back what they return.

In a process vLLM binds memory to NUMA nodes, makes process groups, changes functions of torch and sets variables,
which would reach the tests that come after.
"""

import importlib
import json
import os
from pathlib import Path

from tests.faults.scenarios import finished, run_forked


def run_jobs(folder: Path, **jobs: tuple) -> dict[str, list]:
    """Name -> what the function returned on each rank, by way of JSON. AssertionError with the log if it failed.

    A job: ("module:function", number of ranks, arguments ...). They run one after the other, forked from a process that
    has imported vLLM, which takes seconds. The function begins with init_distributed.
    """
    rows = {}
    for name, (function, ranks, *words) in jobs.items():
        argv = [function, str(folder / f"{name}.returned"), *(str(x) if isinstance(x, Path) else x for x in words)]
        rows[name] = {"module": __name__, "function": "call", "argv": argv, "ranks": ranks}
    finished(run_forked(folder, rows))
    files = {name: [folder / f"{name}.returned{i}" for i in range(ranks)] for name, (_, ranks, *_) in jobs.items()}
    return {name: [json.loads(path.read_text()) for path in paths] for name, paths in files.items()}


def call(function: str, file: str, *words) -> None:
    """Calls "module:function", and writes what it returns to a file per rank."""
    module, _, name = function.partition(":")
    found = getattr(importlib.import_module(module), name)(*words)
    Path(file + os.environ.get("RANK", "0")).write_text(json.dumps(found))
