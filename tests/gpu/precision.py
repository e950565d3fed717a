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

from tests.gpu.report import Failed, Report
from tests.gpu.tiny_runs import flags_of, run, start
from tests.helpers.tiny_run import Inputs, build_inputs, final_weights, read_metrics
from utils.engine.engine import device

# One optimizer step per buffer: all of its ratios are those before the first step.
BF16 = {"dtype": "bf16", "critic_pretrain_steps": 0, "train_steps": 3, "batch_size": 8, "checkpoint_per_step": 1}
REPEATABLE = {"deterministic": True}
RATIO, KL = 0.02, 1e-3  # roundings of bf16 in the logits: by how much the mean ratio, the KL may be off


def check(toy: bool, report: Report) -> None:
    """Figures: the first step's ratio and KL; which metrics do not repeat, with --deterministic and without."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = build_inputs(folder / "inputs")
        flags = flags_of(inputs, folder / "stopped", **BF16 | {"train_steps": 100_000, "checkpoint_per_step": 50_000})
        stopped = start(flags, folder / "stopped.log")
        # The first of all: --deterministic has to be set before CUDA starts.
        said = io.StringIO()
        for run_name, changes in (("first", REPEATABLE), ("second", REPEATABLE), ("third", {}), ("fourth", {})):
            with contextlib.redirect_stdout(said):
                code = run(flags_of(inputs, folder / run_name, **BF16 | changes))
            report.expect(code == 0, f"the {run_name} run ends with exit code {code}")
        print(said.getvalue())
        report(without_deterministic_form=re.findall("--deterministic: (.*) has no", said.getvalue()))
        start_of_ratio(folder / "first", report)
        others = differing(folder / "first", folder / "second")
        report(repeats=not others, not_repeated=others)
        report.expect(not others, f"with --deterministic {len(others)} differ, such as {others[:5]}")
        others = differing(folder / "third", folder / "fourth")
        report(repeats_without_the_flag=not others, not_repeated_without_the_flag=others)
        resumes(inputs, folder, report)
        model = AutoModelForCausalLM.from_pretrained(folder / "first" / "final").to(device())
        logits = model(torch.tensor([[1, 5, 9]], device=device())).logits
        report(exported_dtype=str(logits.dtype))
        report.expect(bool(logits.isfinite().all()), "logits of the exported model are not finite")
        report.expect(logits.dtype == torch.bfloat16, f"the exported model is {logits.dtype}, expected torch.bfloat16")
        ends_by_sigterm(stopped, folder / "stopped", report)


def start_of_ratio(out: Path, report: Report) -> None:
    """Before the first optimizer step the policy is what has sampled, and the reference."""
    first = read_metrics(out)[0]
    report(ratio_off_by=first["ratio_mean"] - 1, approx_kl=first["approx_kl"], kl_ref=first["kl_ref"])
    report.expect(abs(first["ratio_mean"] - 1) <= RATIO, f"first ratio {first['ratio_mean']}, expected 1 ± {RATIO}")
    report.expect(abs(first["approx_kl"]) <= KL, f"first approx_kl {first['approx_kl']}, expected at most {KL}")
    report.expect(first["clip_fraction"] == 0, f"first clip_fraction {first['clip_fraction']}, expected 0")
    report.expect(first["kl_ref"] == 0, f"first kl_ref {first['kl_ref']}, expected 0")


def resumes(inputs: Inputs, folder: Path, report: Report) -> None:
    """Stopped after the first step by --max_hours and started again, a run is the one that was not stopped."""
    out = folder / "resumed"
    codes = [run(flags_of(inputs, out, **BF16 | REPEATABLE | last)) for last in ({"max_hours": 1e-9}, {})]
    report.expect(codes == [75, 0], f"stopping and resuming gave exit codes {codes}, expected [75, 0]")
    others = differing(folder / "first", out)
    report(resumes=not others, not_resumed=others)
    report.expect(not others, f"after a resume {len(others)} differ, such as {others[:5]}")


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
            raise Failed(f"the run for SIGTERM has made no step: {log.read_text('utf-8', 'replace')[-500:]}")
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    code = process.wait(report.seconds_left())
    saved = [path.name for path in (out / "checkpoints").glob("step_*")]
    report(sigterm_seconds=round(time.monotonic() - sent, 1), sigterm_exit_code=code, sigterm_saved=len(saved))
    said = "stopped by SIGTERM after step" in log.read_text("utf-8", "replace")
    report.expect(code == 143 and said, f"SIGTERM: exit code {code}, expected 143 and a line that says so")
    report.expect(len(saved) == 1 and not saved[0].endswith(".partial"), f"SIGTERM left {saved}, expected a checkpoint")
