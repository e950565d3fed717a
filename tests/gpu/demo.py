"""The English demo's PPO (run_en.sh) for as many steps as the time allows, on the model in the folder of --demo."""

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tests.gpu.report import Report
from tests.gpu.tiny_runs import run
from tests.helpers.tiny_run import REPOSITORY, build_inputs, read_lines
from utils.run.stop_signal import OUT_OF_TIME

END = 15  # seconds that are left for the checkpoint at the end
TOY = {"train_steps": 1, "critic_pretrain_steps": 1, "warmup_steps": 1, "num_rollouts": 8, "batch_size": 4}
TOY |= {"num_eval_prompts": 3, "maxlen_res": 12}


def check(toy: bool, report: Report) -> None:
    """Figures: steps, samples per second, how score and KL have moved. The metrics are kept in demo_metrics.jsonl."""
    if not (report.demo or toy):
        report(skipped="give --demo DIR, the folder .demo/en that `bash run_en.sh --demo` makes")
        return
    with tempfile.TemporaryDirectory() as name:
        folder, out = report.demo or toy_demo(Path(name) / "demo"), Path(name) / "run"
        flags = demo_flags(folder, out, "fp32" if toy else "bf16")
        flags += [word for flag, value in TOY.items() if toy for word in (f"--{flag}", str(value))]
        begun = time.monotonic()
        code = run([*flags, "--max_hours", str(max(1.0, report.seconds_left() - END) / 3600)])
        report(seconds_of_run=round(time.monotonic() - begun, 1), exit_code=code)
        report.expect(code in (0, OUT_OF_TIME), f"the demo ends with exit code {code}")
        shutil.copy(out / "metrics.jsonl", report.out / "demo_metrics.jsonl")
        rows = read_lines(out / "metrics.jsonl")
        first, last = rows[0], rows[-1]
        report(
            steps=len(rows), samples_per_second=last["samples_per_second"], score_first=first["score_mean"],
            score_last=last["score_mean"], kl_last=last["kl_ref"],
            seconds_per_step={key: row for key, row in last.items() if key.startswith("seconds_")},
        )  # fmt: skip
        report.expect(first["kl_ref"] == 0, f"the KL begins at {first['kl_ref']}, expected 0")
        if code == 0 and not toy:
            more = last["score_mean"] - first["score_mean"]
            report.expect(more > 0, f"the score went from {first['score_mean']:.3f} to {last['score_mean']:.3f}")


def demo_flags(folder: Path, out: Path, dtype: str) -> list[str]:
    """The flags of train_ppo.py as the demo in run_en.sh has them."""
    array = re.search(r"local (ppo_args=\(.*?\n  \))", (REPOSITORY / "run_en.sh").read_text("utf-8"), re.DOTALL)[1]
    variables = {"cache": folder, "reward": folder / "reward-seed1", "output": out, "DTYPE": dtype, "seed": 1}
    given = [f"{name}={value}" for name, value in variables.items()]
    script = 'export "$@"; ' + array + '; printf "%s\\n" "${ppo_args[@]}"'
    result = subprocess.run(["bash", "-c", script, "demo", *given], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def toy_demo(folder: Path) -> Path:
    """A folder like the demo's, with tiny models."""
    inputs = build_inputs(folder)
    inputs.policy.rename(folder / "model")
    (folder / "reward-seed1").mkdir()
    inputs.reward.rename(folder / "reward-seed1" / "final")
    return folder
