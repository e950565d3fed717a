"""One check in a process of its own:   python -m tests.gpu.report NAME FIGURES SECONDS [--toy]

Figures go to the file FIGURES as lines of JSON, an error as the key "error" of its last line.
"""

import faulthandler
import importlib
import json
import signal
import sys
import time
import traceback


class Report:
    """Call it with figures: `report(seconds=1.5)`. They are on the disk at once and survive a time limit."""

    def __init__(self, file: str, seconds: float):
        """file: JSON lines that the runner reads. seconds: until the runner ends the check."""
        self._file, self._end = file, time.monotonic() + seconds
        self.failures: list[str] = []

    def __call__(self, **figures) -> None:
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def expect(self, condition: bool, text: str) -> None:
        """Notes a failure where the condition does not hold; the check goes on and fails at its end."""
        if not condition:
            self.failures.append(text)

    def seconds_left(self) -> float:
        """Seconds until the runner ends the check."""
        return self._end - time.monotonic()


def main(name: str, file: str, seconds: str, toy: bool) -> int:
    """Exit code 0 where the check has passed."""
    faulthandler.register(signal.SIGUSR1)  # the runner asks for the stacks before it kills
    report = Report(file, float(seconds))
    try:
        importlib.import_module(f"tests.gpu.{name}").check(toy, report)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a check may do wrong is its result
        traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        report.expect(False, f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})")
    if report.failures:
        report(error="; ".join(report.failures))
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4], "--toy" in sys.argv))
