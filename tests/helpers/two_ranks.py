"""The same runs in one process and on two ranks."""

import importlib
from pathlib import Path

from tests.faults.scenarios import finished, run_forked
from tests.helpers.tiny_run import Inputs, run_flags

Runs = dict[str, tuple[str, dict]]  # name -> (module of the command, flags)


def alone_and_on_two_ranks(
    inputs: Inputs, folder: Path, runs: Runs, stages: tuple[int, ...] = (2, 3)
) -> dict[str, Path]:
    """ "NAME STAGE" -> folder of a run on two ranks; "NAME alone": of one process."""
    alone, rows = {}, {}
    for name, (module, flags) in runs.items():
        alone[f"{name} alone"] = folder / f"{name} alone"
        importlib.import_module(module).main(run_flags(inputs, alone[f"{name} alone"], **flags))
        for stage in stages:
            argv = run_flags(inputs, folder / f"{name} {stage}", zero_stage=stage, **flags)
            rows[f"{name} {stage}"] = {"module": module, "argv": argv}
    return finished(run_forked(folder, rows)) | alone
