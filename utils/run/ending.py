"""The end of a run, finished or stopped: report.html, and a line that says where everything is."""

import os
from collections.abc import Callable

from utils.distributed import barrier, is_main
from utils.errors import Say
from utils.flags.run import RunFlags
from utils.report.page import write_report
from utils.report.read import RunFiles, read_run
from utils.run.index import LINES, MODELS, OTHER_MODELS, REPORT
from utils.watchdog import report_progress


def end_run(config: RunFlags, say: Say, judge: Callable[[RunFiles], None]) -> None:
    """Writes the report on rank 0 and says where everything is. No problem of the report stops a run. Collective.

    judge: adds to what was read of the run what only its stage knows.
    """
    path = config.model_save_path
    if is_main() and os.path.exists(os.path.join(path, LINES[0])):  # else it was stopped before its first step
        try:
            run = read_run(path)
            judge(run)
            write_report([run], os.path.join(path, REPORT))
        except Exception as error:  # noqa: BLE001 -- also of matplotlib, or of a disk that is full
            say(f"warning: {REPORT} was not written: {error or type(error).__name__}")
        say(_places(path, config.logdir))
    barrier()
    report_progress("report")


def _places(path: str, logdir: str | None) -> str:
    found = [name for name in (*MODELS, *OTHER_MODELS) if os.path.isdir(os.path.join(path, name))]
    found = [f"{name}/" for name in found] + [name for name in LINES if os.path.isfile(os.path.join(path, name))]
    if os.path.isfile(os.path.join(path, REPORT)):
        found.insert(0, f"{REPORT} (open it in a browser)")
    board = logdir or os.path.join(path, "tensorboard")
    return f"everything is in {path}: {', '.join(found)}; tensorboard --logdir {board}"
