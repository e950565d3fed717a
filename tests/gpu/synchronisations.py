"""Where the host waits for the GPU in one PPO step, by source line, from PyTorch's own warnings."""

import contextlib
import tempfile
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from ppo.decoding.scheduler import _Decoder
from tests.gpu.report import Report
from tests.gpu.tiny_runs import flags_of, train
from tests.helpers.tiny_run import REPOSITORY, build_inputs
from utils.engine.engine import device, shutdown_distributed

WARNING = "called a synchronizing CUDA operation"  # of torch.cuda.set_sync_debug_mode
# Of decoding: a forward over prompts, one over new tokens, a look at what has ended. Where a forward is captured as a
# graph, its waits are counted by themselves.
PARTS = ("_fill", "_advance", "look")
OWN = ("ppo", "reward", "sft", "utils", "data", "train_ppo.py")


class Waits:
    """Counts by phase and source line, and of decoding by part; `calls` counts how often each part was called."""

    def __init__(self):
        self.counting = False
        self.lines: dict[str, Counter] = defaultdict(Counter)
        self.parts, self.calls = Counter(), Counter()
        self.others: Counter = Counter()  # other warnings, such as that there are no graphs

    def note(self) -> None:
        """Called where the host waits. Its line is the innermost of ours, with the library's behind it."""
        if not self.counting:
            return
        between = (__file__, warnings.__file__)
        stack = [frame for frame in traceback.extract_stack() if frame.filename not in between]
        names = [frame.name for frame in stack]
        own = [(place, frame.name) for frame in stack if (place := own_place(frame))]
        line, last = own[-1][0] if own else "?", stack[-1]
        if not own_place(last):
            line += f" ({'/'.join(Path(last.filename).parts[-2:])}:{last.lineno})"
        phases = [name for _, name in own]
        phase = (phases[phases.index("loop") + 1 :] or ["loop"])[0] if "loop" in phases else "?"
        self.lines[phase][line] += 1
        self.parts.update(["_capture"] if "_capture" in names else [part for part in PARTS if part in names])


def own_place(frame: traceback.FrameSummary) -> str:
    """ "ppo/score.py:12", or nothing where that is not product code."""
    path = Path(frame.filename)
    if not path.is_relative_to(REPOSITORY) or path.relative_to(REPOSITORY).parts[0] not in OWN:
        return ""
    return f"{path.relative_to(REPOSITORY)}:{frame.lineno}"


@contextlib.contextmanager
def watched() -> Iterator[Waits]:
    """Inside, waits are noted, in copies and `.item()` as in `torch.cuda.synchronize`, and calls of PARTS counted."""
    waits, synchronize = Waits(), torch.cuda.synchronize
    originals = {name: getattr(_Decoder, name) for name in PARTS}

    def note_warning(message, *_) -> None:
        if WARNING in str(message):
            waits.note()
        else:
            waits.others[str(message)[:200]] += 1

    def note_synchronize(*args) -> None:
        waits.note()
        synchronize(*args)

    def counted(name: str):
        def call(self, *args):
            waits.calls[name] += waits.counting
            return originals[name](self, *args)

        call.__name__ = call.__qualname__ = f"counted_{name}"
        return call

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning, torch.cuda.synchronize = note_warning, note_synchronize
        for name in PARTS:
            setattr(_Decoder, name, counted(name))
        if device().type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            if device().type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize = synchronize
            for name, original in originals.items():
                setattr(_Decoder, name, original)


def check(toy: bool, report: Report) -> None:
    """Figures: waits by phase and line in the second step of a tiny run, and per call of each part of decoding."""
    with tempfile.TemporaryDirectory() as name, watched() as waits:
        waits.counting = True
        warnings.warn(WARNING, stacklevel=1)
        torch.ones(1, device=device()).tolist()
        found = sum(counter.total() for counter in waits.lines.values())
        waits.counting = False
        waits.lines.clear()
        expected = 2 if device().type == "cuda" else 1
        report.expect(found == expected, f"the harness has found {found} waits in a trial, expected {expected}")

        def watch_second_step(run) -> None:
            begin = run.next_prompts

            def next_prompts():
                waits.counting = run.state.step == 1  # the second step: nothing is set up for the first time
                return begin()

            run.next_prompts = next_prompts

        inputs = build_inputs(Path(name))
        train(flags_of(inputs, Path(name) / "run", dtype="bf16", critic_pretrain_steps=0), watch_second_step)
        shutdown_distributed()
    totals = {phase: counter.total() for phase, counter in waits.lines.items()}
    per_call = {part: waits.parts[part] / max(1, waits.calls[part]) for part in PARTS}
    report(
        waits=sum(totals.values()), waits_per_phase=totals, decoding_calls=dict(waits.calls),
        waits_per_line={phase: dict(counter.most_common()) for phase, counter in waits.lines.items()},
        waits_while_capturing=waits.parts["_capture"], other_warnings=dict(waits.others),
        waits_per_token=per_call["_advance"], waits_per_look=per_call["look"], waits_per_fill=per_call["_fill"],
    )  # fmt: skip
    report.expect(waits.calls["_advance"] > 0, "no token was decoded in the step that was watched")
    report.expect(waits.parts["_advance"] == 0, f"{per_call['_advance']:.2f} waits per forward of new tokens, aim 0")
