"""Passes a check's figures to the runner as soon as they are known, and collects its failures."""

import json
import time
from pathlib import Path


class Failed(Exception):
    """An expectation that was not met; says what was expected and what came instead."""


class Report:
    """Call it with figures: `report(seconds=1.5)`. They are on the disk at once and survive a time limit."""

    def __init__(self, file: Path, seconds: float):
        """file: JSON lines that the runner reads. seconds: until the runner ends the check."""
        self._file, self._end = file, time.monotonic() + seconds
        self._failures: list[str] = []

    def __call__(self, **figures) -> None:
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def expect(self, condition: bool, text: str) -> None:
        """Notes a failure where the condition does not hold; the check goes on and fails at its end."""
        if not condition:
            self._failures.append(text)

    def end(self) -> None:
        """Raises `Failed` with all that `expect` has noted."""
        if self._failures:
            raise Failed("; ".join(self._failures))

    def seconds_left(self) -> float:
        """Seconds until the runner ends the check."""
        return self._end - time.monotonic()
