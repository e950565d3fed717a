"""The end of a run, finished or stopped: report.html, a line that says where everything is, the upload."""

import os
from collections.abc import Callable

from utils.errors import Say
from utils.flags.run import RunFlags
from utils.report.page import write_report
from utils.report.read import RunFiles, read_run
from utils.run.index import LINES, MODELS, OTHER_MODELS, REPORT
from utils.run.push import push_final


def end_run(config: RunFlags, say: Say, judge: Callable[[RunFiles], None], is_finished: bool) -> None:
    """Writes the report, says where everything is, and uploads final/ of a finished run. Call it on one rank.

    The other ranks do not wait for it. judge: adds to what was read of the run what only its stage knows. No problem
    of report or upload stops a run.
    """
    path = config.model_save_path
    if os.path.exists(os.path.join(path, LINES[0])):  # else it was stopped before its first step
        try:
            run = read_run(path)
            judge(run)
            write_report([run], os.path.join(path, REPORT))
        except Exception as error:  # noqa: BLE001 -- also of matplotlib, or of a disk that is full
            say(f"warning: {REPORT} was not written: {error or type(error).__name__}")
        say(_places(path, config.logdir))
    if is_finished:
        push_final(config)


def _places(path: str, logdir: str | None) -> str:
    found = [name for name in (*MODELS, *OTHER_MODELS) if os.path.isdir(os.path.join(path, name))]
    found = [f"{name}/" for name in found] + [name for name in LINES if os.path.isfile(os.path.join(path, name))]
    if os.path.isfile(os.path.join(path, REPORT)):
        found.insert(0, f"{REPORT} (open it in a browser)")
    board = logdir or os.path.join(path, "tensorboard")
    return f"everything is in {path}: {', '.join(found)}; tensorboard --logdir {board}"
