"""Where the host waits for the GPU in one PPO step, by source line, from PyTorch's own warnings."""

import tempfile
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import torch

from ppo.decoding.scheduler import _Decoder
from tests.gpu.report import Report
from tests.gpu.tiny_runs import flags_of, train
from tests.helpers.tiny_run import REPOSITORY, build_inputs
from utils.engine.engine import device, shutdown_distributed

WARNING = "called a synchronizing CUDA operation"  # of torch.cuda.set_sync_debug_mode
PARTS = ("_fill", "_advance", "look")  # of decoding: a forward over prompts, over new tokens, a look at what has ended
OWN = ("ppo", "reward", "sft", "utils", "data", "train_ppo.py")


def watch(stacks: list[traceback.StackSummary], calls: Counter) -> None:
    """From now on, stacks gets the place of each wait, and calls counts those of PARTS. For the rest of the process."""
    synchronize = torch.cuda.synchronize

    def note(message, *_) -> None:
        if WARNING in str(message):
            stacks.append(traceback.extract_stack())

    def note_synchronize(*args) -> None:
        note(WARNING)
        synchronize(*args)

    def counted(part: str, function):
        def call(*args):
            calls[part] += 1
            return function(*args)

        return call

    warnings.simplefilter("always")
    warnings.showwarning, torch.cuda.synchronize = note, note_synchronize
    for part in PARTS:
        setattr(_Decoder, part, counted(part, getattr(_Decoder, part)))
    if device().type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")


def place(stack: traceback.StackSummary) -> tuple[str, str]:
    """(phase of the step, innermost line of product code)."""
    own = []
    for frame in stack:
        path = Path(frame.filename)
        if path.is_relative_to(REPOSITORY) and path.relative_to(REPOSITORY).parts[0] in OWN:
            own.append((f"{path.relative_to(REPOSITORY)}:{frame.lineno}", frame.name))
    names = [name for _, name in own]
    phase = names[names.index("loop") + 1 :][:1] if "loop" in names else ["?"]
    return (phase or ["loop"])[0], own[-1][0] if own else "?"


def check(toy: bool, report: Report) -> None:
    """Figures: waits by phase and line in the second step of a tiny run, and per call of each part of decoding."""
    stacks, calls = [], Counter()
    watch(stacks, calls)
    warnings.warn(WARNING, stacklevel=1)
    torch.ones(1, device=device()).tolist()
    expected = 2 if device().type == "cuda" else 1
    report.expect(len(stacks) == expected, f"the harness has found {len(stacks)} waits in a trial, expected {expected}")

    def second_step_only(run) -> None:
        begin = run.next_prompts

        def next_prompts():
            if run.state.step == 1:  # the second step: nothing is set up for the first time
                stacks.clear()
                calls.clear()
            return begin()

        run.next_prompts = next_prompts

    with tempfile.TemporaryDirectory() as name:
        inputs = build_inputs(Path(name))
        train(flags_of(inputs, Path(name) / "run", dtype="bf16", critic_pretrain_steps=0), second_step_only)
        shutdown_distributed()
    lines, parts = defaultdict(Counter), Counter()
    for stack in stacks:
        phase, line = place(stack)
        lines[phase][line] += 1
        names = {frame.name for frame in stack}  # where a forward is captured as a graph, its waits count by themselves
        parts.update(["_capture"] if "_capture" in names else names & set(PARTS))
    per_call = {part: parts[part] / max(1, calls[part]) for part in PARTS}
    report(
        waits=len(stacks), waits_per_phase={phase: counter.total() for phase, counter in lines.items()},
        waits_per_line=lines, decoding_calls=calls, waits_while_capturing=parts["_capture"],
        waits_per_token=per_call["_advance"], waits_per_look=per_call["look"], waits_per_fill=per_call["_fill"],
    )  # fmt: skip
    report.expect(calls["_advance"] > 0, "no token was decoded in the step that was watched")
    report.expect(parts["_advance"] == 0, f"{per_call['_advance']:.2f} waits per forward of new tokens, aim 0")
