"""One check in a process of its own:   python -m tests.gpu.child NAME FIGURES [--toy]

Imports what the check needs, then waits for a line on stdin, the seconds that it has, before it touches the device.
Figures go to the file FIGURES as lines of JSON, an error as the key "error" of its last line.
"""

import faulthandler
import importlib
import signal
import sys
import traceback
from pathlib import Path

from tests.gpu.report import Failed, Report


def main(name: str, file: str, toy: bool) -> None:
    """Exit code 0 where the check has passed."""
    faulthandler.register(signal.SIGUSR1)  # the runner asks for the stacks before it kills
    try:
        module = importlib.import_module(f"tests.gpu.{name}")
        line = sys.stdin.readline()
        if not line:  # the runner has ended
            return
        report = Report(Path(file), float(line))
        module.check(toy, report)
        report.end()
        return
    except Failed as failure:
        error = str(failure)
    except (Exception, SystemExit) as failure:  # noqa: BLE001  whatever a check may do wrong is its result
        traceback.print_exc()
        frame = traceback.extract_tb(failure.__traceback__)[-1]
        error = f"{type(failure).__name__}: {failure} ({frame.filename}:{frame.lineno})"
    Report(Path(file), 0.0)(error=error)
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--toy" in sys.argv)
