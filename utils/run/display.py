"""What a run prints about its steps: on a terminal a table above a bar, elsewhere plain lines."""

import math
import sys
import time

from tqdm import tqdm

from utils.device import peak_memory

LEVELS = "▁▂▃▄▅▆▇█"
HEADER_EVERY = 20  # rows of the table
# 59 characters, so that no row is wrapped in a window of 60.
_HEADER = f"{'step':>9} {'score':>7} {'KL':>6} {'length':>6} {'EOS':>4} {'step s':>7} {'memory':>6} {'left':>7}"


def sparkline(values: list[float], width: int = 20) -> str:
    """Returns a curve as text, from ▁ (lowest value) to █ (highest), of at most `width` values, evenly spaced."""
    every = -(-len(values) // width)
    shown, low, high = values[(len(values) - 1) % every :: every], min(values), max(values)
    return "".join(LEVELS[int((len(LEVELS) - 1) * (value - low) / ((high - low) or 1) + 0.5)] for value in shown)


def duration(seconds: float) -> str:
    """Returns a time as 45s, 12m, 3h05m or 2d03h."""
    minutes, hours = int(seconds / 60 + 0.5), int(seconds / 3600 + 0.5)
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    if minutes < 60:
        return f"{minutes}m"
    return f"{minutes // 60}h{minutes % 60:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


class Display:
    """Prints lines, and those of steps: every `every` ones, the first and the last. start: steps that are done."""

    def __init__(self, total: int, start: int, every: int):
        self.is_live = sys.stdout.isatty() and sys.stderr.isatty()
        self._total, self._every, self._rows = total, every, 0
        self._first, self._started = start, time.perf_counter()
        self._last = self._started
        self.curve: dict[int, float] = {}  # step -> score, or loss
        self._bar = None
        if self.is_live:
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Prints a step's numbers, with the time that is left at the speed of this process so far."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        left = (now - self._started) / max(1, step - self._first) * (self._total - step)
        name = "score_mean" if "score_mean" in values else "loss"
        if not math.isfinite(values.get(name, math.nan)):
            return
        self.curve[step] = values[name]
        curve = sparkline(list(self.curve.values()))
        if self._bar is not None:
            self._bar.set_postfix_str(curve, refresh=False)
        if step % self._every and step not in (self._first + 1, self._total):
            return
        if name == "loss":
            numbers = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
            self.say(f"step {step}/{self._total}: {numbers}  left {duration(left)}")
        elif self.is_live:
            if self._rows % HEADER_EVERY == 0:
                self.say(_HEADER)
            self._rows += 1
            place = f"{step}/{self._total}"
            self.say(
                f"{place if len(place) < 10 else step:>9} {values[name]:7.2f} {values['kl_ref']:6.2f} "
                f"{values['response_length']:6.1f} {values['eos_fraction']:4.0%} {seconds:7.1f} "
                f"{f'{peak_memory() / 1e9:.1f}G':>6} {duration(left):>7}"
            )
        else:
            self.say(
                f"step {step}/{self._total}: score {values[name]:.2f}, KL {values['kl_ref']:.2f}, length "
                f"{values['response_length']:.1f}, ended {values['eos_fraction']:.0%}, {seconds:.1f} s, "
                f"{peak_memory() / 1e9:.1f} GB, {duration(left)} left {curve}"
            )

    def advance(self) -> None:
        """Moves the bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def phase(self, name: str) -> None:
        """Says beside the bar which part of the step was completed."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{sparkline(list(self.curve.values() or [0]))} {name} done")

    def rewind(self, step: int) -> None:
        """Forgets the steps after this one."""
        self.curve = {at: value for at, value in self.curve.items() if at <= step}
        if self._bar is not None:
            self._bar.n = step

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
