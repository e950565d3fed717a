"""Small runs that something befalls, one after the other, in processes forked from this one:

    python -m tests.faults.scenarios CASES.json

A case: {"ranks": 2, "fault": a name in FAULTS or null, "patience": seconds, "log": file, "argv": of train_ppo.py}.
Prints the exit codes of each as JSON.
"""

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
from tests.tiny_run import REPOSITORY, Inputs, clean_environment, run_flags
from train_ppo import main as train_ppo

SMALL = {"train_steps": 3, "checkpoint_per_step": 1, "keep_checkpoints": 3, "num_eval_prompts": 0}


@dataclass(frozen=True)
class Result:
    """What a case left."""

    codes: list[int]  # of both ranks, negative for signals
    log: str  # of both
    out: Path


def run_cases(folder: Path, inputs: Inputs, cases: dict[str, dict], runs: Path | None = None) -> dict[str, Result]:
    """Name -> result. A case: flags, and besides them `fault`, `ranks`, `patience`, `out` (the run's folder in `runs`).

    runs: where that folder is, if not in `folder` as the logs are.
    """
    rows = []
    for name, case in cases.items():
        flags = dict(case)
        own = {"fault": None, "ranks": 2, "patience": 60, "out": name}
        own = {key: flags.pop(key, value) for key, value in own.items()}
        out = (runs or folder) / own.pop("out").replace(" ", "_")
        log = folder / f"{name.replace(' ', '_')}.log"
        rows.append(own | {"log": str(log), "argv": run_flags(inputs, out, **SMALL | flags)})
    (folder / "cases.json").write_text(json.dumps(rows))
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.scenarios", str(folder / "cases.json")],
        cwd=REPOSITORY, env=clean_environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    codes = json.loads(result.stdout.splitlines()[-1])
    outs = (Path(row["argv"][row["argv"].index("--model_save_path") + 1]) for row in rows)
    found = zip(cases, codes, rows, outs, strict=True)
    return {name: Result(code, Path(row["log"]).read_text(), out) for name, code, row, out in found}


def main() -> None:
    """All cases of the file."""
    torch.set_num_threads(1)  # before the first tensor: a process that has threads must not be forked
    codes = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        fault = FAULTS[case["fault"]] if case["fault"] else nothing
        children = start(lambda argv=case["argv"]: train_ppo(argv), case["ranks"], Path(case["log"]), fault)
        codes.append(wait(children, case["patience"]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
