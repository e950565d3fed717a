"""Small runs that something befalls, one after the other, in processes forked from this one:

    python -m tests.faults.scenarios CASES.json

A case: {"module": with a `main`, "argv": for it, "ranks": 2, "fault": a name in FAULTS or null, "patience": seconds,
"log": file}. Prints the exit codes of each as JSON.
"""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from tests.faults.faults import FAULTS
from tests.faults.kill import nothing, start, wait
from tests.helpers.tiny_run import REPOSITORY, Inputs, clean_environment, run_flags

DEFAULTS = {"module": "train_ppo", "ranks": 2, "fault": None, "patience": 60}
SMALL = {"train_steps": 3, "checkpoint_per_step": 1, "keep_checkpoints": 3, "num_eval_prompts": 0}


@dataclass(frozen=True)
class Result:
    """What a case left."""

    codes: list[int]  # of both ranks, negative for signals
    log: str  # of both
    out: Path


def run_cases(folder: Path, inputs: Inputs, cases: dict[str, dict], runs: Path | None = None) -> dict[str, Result]:
    """Name -> result of runs of train_ppo.py. A case: flags, and besides them what differs from DEFAULTS, and `out`.

    That is the run's folder in `runs`, if that is not in `folder` as the logs are.
    """
    rows = {}
    for name, case in cases.items():
        flags = dict(case)
        own = {key: flags.pop(key) for key in DEFAULTS if key in flags}
        out = (runs or folder) / flags.pop("out", name).replace(" ", "_")
        rows[name] = own | {"argv": run_flags(inputs, out, **SMALL | flags)}
    return run_forked(folder, rows)


def run_forked(folder: Path, rows: dict[str, dict]) -> dict[str, Result]:
    """Name -> result. A row: "argv", and what differs from DEFAULTS. Packages are imported once for all of them."""
    cases = [DEFAULTS | row | {"log": str(folder / f"{name}.log".replace(" ", "_"))} for name, row in rows.items()]
    (folder / "cases.json").write_text(json.dumps(cases))
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.scenarios", str(folder / "cases.json")],
        cwd=REPOSITORY, env=clean_environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    codes = json.loads(result.stdout.splitlines()[-1])
    outs = (Path(case["argv"][case["argv"].index("--model_save_path") + 1]) for case in cases)
    found = zip(rows, codes, cases, outs, strict=True)
    return {name: Result(code, Path(case["log"]).read_text(), out) for name, code, case, out in found}


def finished(results: dict[str, Result]) -> dict[str, Path]:
    """Name -> folder, of runs on two ranks. AssertionError unless all have come to their end."""
    for name, result in results.items():
        assert result.codes == [0, 0], f"{name}: {result.log[-3000:]}"
    return {name: result.out for name, result in results.items()}


def main() -> None:
    """All cases of the file."""
    torch.set_num_threads(1)  # before the first tensor: a process that has threads must not be forked
    codes = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        fault = FAULTS[case["fault"]] if case["fault"] else nothing
        run = importlib.import_module(case["module"]).main
        children = start(lambda run=run, argv=case["argv"]: run(argv), case["ranks"], Path(case["log"]), fault)
        codes.append(wait(children, case["patience"]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
