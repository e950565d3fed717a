"""Folders of runs with files that are made by hand, for reports."""

import json

from ppo.report import judge
from utils.report.read import read_run

STEP = {"score_mean": 0.5, "score_std": 1.0, "kl_ref": 1.0, "perplexity": 5.0, "eos_fraction": 1.0,
        "response_length": 9.0}  # fmt: skip
HOSTILE = "<script>alert(1)</script>&\x1b[2J\u202eevil\u2028"


def make_run(folder, metrics: list[dict], samples: list[dict] = (), comparison: dict | None = None, **config):
    """A run's folder, as the trainers and ppo.compare write it. Metrics and samples count their steps from 1."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, rows in (("metrics", metrics), ("samples", samples)):
        lines = [json.dumps({"step": row.get("step", i)} | row) for i, row in enumerate(rows, 1)]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if comparison:
        (folder / "comparison.json").write_text(json.dumps(comparison))
    return folder


def judged(folder):
    run = read_run(folder)
    judge(run)
    return run
