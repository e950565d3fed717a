"""Tiny runs in bf16: the ratio starts at 1, a run repeats and resumes bit for bit, its model loads, SIGTERM saves."""

import contextlib
import io
import re
import signal
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.gpu.report import Report
from tests.gpu.tiny_runs import flags_of, run, start
from tests.helpers.tiny_run import build_inputs, final_weights, read_metrics
from utils.engine.engine import device

# One optimizer step per buffer: all of its ratios are those before the first step.
BF16 = {"dtype": "bf16", "critic_pretrain_steps": 0, "train_steps": 3, "batch_size": 8, "checkpoint_per_step": 1}
REPEATABLE = {"deterministic": True}
RATIO, KL = 0.02, 1e-3  # roundings of bf16 in the logits: by how much the mean ratio, the KL may be off


def check(toy: bool, report: Report) -> None:
    """Figures: the first step's ratio and KL; what does not repeat, with --deterministic and without, and resume."""
    with tempfile.TemporaryDirectory() as name:
        folder, said = Path(name), io.StringIO()
        inputs = build_inputs(folder / "inputs")
        flags = flags_of(inputs, folder / "stopped", **BF16 | {"train_steps": 100_000, "checkpoint_per_step": 50_000})
        stopped = start(flags, folder / "stopped.log")
        runs = {  # name -> changes and exit code. --deterministic first of all: it has to be set before CUDA starts
            "first": (REPEATABLE, 0), "second": (REPEATABLE, 0), "resumed": (REPEATABLE | {"max_hours": 1e-9}, 75),
            "third": ({}, 0), "fourth": ({}, 0),
        }  # fmt: skip
        with contextlib.redirect_stdout(said):
            for each, (changes, expected) in runs.items():
                code = run(flags_of(inputs, folder / each, **BF16 | changes))
                report.expect(code == expected, f"the {each} run ends with exit code {code}, expected {expected}")
            report.expect(run(flags_of(inputs, folder / "resumed", **BF16 | REPEATABLE)) == 0, "a run does not go on")
        print(said.getvalue())
        report(without_deterministic_form=re.findall("--deterministic: (.*) has no", said.getvalue()))
        first = read_metrics(folder / "first")[0]
        off = {"ratio_off_by": first["ratio_mean"] - 1} | {
            x: first[x] for x in ("approx_kl", "clip_fraction", "kl_ref")
        }
        report(**off)  # before the first optimizer step the policy is what has sampled, and the reference
        for (figure, found), limit in zip(off.items(), (RATIO, KL, 0, 0), strict=True):
            report.expect(abs(found) <= limit, f"{figure} of the first step is {found}, expected at most {limit}")
        for figure, a, b in (("repeats", "first", "second"), ("resumes", "first", "resumed")):
            others = differing(folder / a, folder / b)
            report(**{figure: not others, f"not_{figure}": others})
            report.expect(not others, f"{figure}: with --deterministic {len(others)} differ, such as {others[:5]}")
        others = differing(folder / "third", folder / "fourth")
        report(repeats_without_the_flag=not others, not_repeated_without_the_flag=others)
        model = AutoModelForCausalLM.from_pretrained(folder / "first" / "final").to(device())
        logits = model(torch.tensor([[1, 5, 9]], device=device())).logits
        sound = bool(logits.isfinite().all()) and logits.dtype == torch.bfloat16
        report.expect(sound, f"logits of the exported model are not finite, or {logits.dtype} instead of bfloat16")
        ends_by_sigterm(stopped, folder / "stopped", report)


def differing(out: Path, expected: Path) -> list[str]:
    """What is not bit-equal in two finished runs: metrics with their first step, weights of the policy by name."""
    found = {}
    for row, other in zip(read_metrics(out), read_metrics(expected), strict=True):
        for key in row.keys() | other.keys():
            if row.get(key) != other.get(key):
                found.setdefault(key, f"{key} from step {row['step']}")
    weights, others = final_weights(out), final_weights(expected)
    return sorted(found.values()) + [name for name in weights if not torch.equal(weights[name], others[name])]


def ends_by_sigterm(process, out: Path, report: Report) -> None:
    """At the end of the step a checkpoint is written, and the exit code is a signal's."""
    metrics, log = out / "metrics.jsonl", out.with_suffix(".log")
    while not metrics.exists() or not metrics.read_text():
        if process.poll() is not None or report.seconds_left() < 0:
            raise RuntimeError(f"the run for SIGTERM has made no step: {log.read_text('utf-8', 'replace')[-500:]}")
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    code = process.wait(report.seconds_left())
    saved = [path.name for path in (out / "checkpoints").glob("step_*")]
    report(sigterm_seconds=round(time.monotonic() - sent, 1), sigterm_exit_code=code, sigterm_saved=len(saved))
    said = "stopped by SIGTERM after step" in log.read_text("utf-8", "replace")
    report.expect(code == 143 and said, f"SIGTERM: exit code {code}, expected 143 and a line that says so")
    report.expect(len(saved) == 1 and not saved[0].endswith(".partial"), f"SIGTERM left {saved}, expected a checkpoint")
