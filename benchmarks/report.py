"""Seconds and size of the report of a long PPO run, and how long Chromium takes to open it.

    python benchmarks/report.py [--steps 10000] [--samples 8] [--repeats 3]

Makes the folder of a run with realistic files, without training, and calls `python -m ppo.report` on it as a user does.
Opening: the time of `chromium --headless --dump-dom` on the page minus that on an empty page. Both are
the shortest of some repeats, because other work on the machine only adds to them.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EVALUATED = ("score_mean", "score_std", "kl_ref", "response_length", "perplexity", "perplexity_ref", "entropy")
WORDS = ["the", "answer", "depends", "on", "what", "you", "would", "like", "to", "know", "about", "this", "and", "how"]


def row_of(step: int, draw: random.Random) -> dict[str, float]:
    """About 60 metrics of a step."""
    noise = lambda size=0.1: draw.gauss(0, size)  # noqa: E731
    progress = 1 - math.exp(-step / 3000)
    row = {
        "score_mean": 2 * progress + noise(), "score_std": 1 + noise(), "kl_ref": 12 * progress + noise(0.4),
        "response_length": 200 - 40 * progress + noise(8), "perplexity": 6 - 2 * progress + noise(),
        "perplexity_ref": 6 + noise(), "entropy": 1.8 - 0.5 * progress + noise(0.05), "eos_fraction": 0.97,
        "value_loss": 0.2 * math.exp(-step / 1000) + abs(noise(0.02)), "explained_variance": 0.6 * progress + noise(),
        "policy_loss": noise(0.01), "clip_fraction": abs(noise(0.02)), "value_clip_fraction": abs(noise(0.02)),
        "grad_norm_policy": 1 + abs(noise()), "grad_norm_critic": 3 + abs(noise()), "lr_policy": 5e-7,
        "lr_critic": 1.65e-6, "tokens_per_second": 3000 + noise(50), "seconds_rollout": 40 + noise(2),
        "seconds_score": 9 + noise(), "seconds_update": 25 + noise(), "memory_peak_gb": 60.0,
    }  # fmt: skip
    row |= {f"other_metric_{i}": noise(1) for i in range(38)}
    if step % 100 == 0:
        row |= {f"eval_{key}": row[key] + noise(0.02) for key in EVALUATED} | {"eval_num_prompts": 128}
    return row


def make_run(folder: Path, steps: int, samples: int) -> None:
    """Writes config.json, metrics.jsonl and samples.jsonl of a run in progress."""
    draw = random.Random(1)
    (folder / "config.json").write_text(json.dumps({"train_steps": steps, "lr": 5e-7, "changed_flags": {"lr": 1e-6}}))
    text = lambda: " ".join(draw.choices(WORDS, k=60))  # noqa: E731
    with open(folder / "metrics.jsonl", "w") as metrics, open(folder / "samples.jsonl", "w") as lines:
        for step in range(1, steps + 1):
            metrics.write(json.dumps({"step": step, **row_of(step, draw)}) + "\n")
            for i in range(samples):
                held = {"held_out": True} if step % 100 == 0 and i < samples // 2 else {}
                prompt = f"prompt {i if held else (step, i)}: {text()}"
                row = {"step": step, **held, "prompt": prompt, "answer": text(), "score": draw.gauss(0, 1)}
                lines.write(json.dumps(row) + "\n")


def seconds(command: list[str]) -> float:
    """Returns the seconds that a command takes."""
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=8, help="rows of samples.jsonl per step")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run, empty = Path(place, "run"), Path(place, "empty.html")
        run.mkdir()
        make_run(run, arguments.steps, arguments.samples)
        empty.write_text("<!DOCTYPE html><title>empty</title>")
        sizes = {file.name: file.stat().st_size / 1e6 for file in run.iterdir()}
        print(", ".join(f"{name} {size:.1f} MB" for name, size in sorted(sizes.items())))
        command = [sys.executable, "-m", "ppo.report", str(run)]
        times = [seconds(command) for _ in range(arguments.repeats)]
        page, used = run / "report.html", os.times()
        print(f"python -m ppo.report: {min(times):.2f} s (all: {', '.join(f'{x:.2f}' for x in sorted(times))})")
        used = (used.children_user + used.children_system) / arguments.repeats
        print(f"processor time of one: {used:.2f} s; {page.name}: {page.stat().st_size / 1e6:.2f} MB")
        if not (chromium := shutil.which("chromium")):
            return
        browser = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={place}/profile"]
        opened = {x: [] for x in (page, empty)}
        for _ in range(arguments.repeats + 1):  # the first one makes the profile
            for file, found in opened.items():
                found.append(seconds([*browser, "--dump-dom", file.as_uri()]))
        ours, bare = (min(found[1:]) for found in opened.values())
        print(f"Chromium: {ours:.2f} s, empty page {bare:.2f} s: opened in {ours - bare:.2f} s")


if __name__ == "__main__":
    main()
