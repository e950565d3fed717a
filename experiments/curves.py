"""The stored results of a run: metrics and gold scores in bins of ten steps."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import exp, log
from pathlib import Path
from statistics import fmean, median

import torch

from experiments.gold import gold

BIN = 10  # steps
METRICS = ["score_mean", "score_std", "kl_ref", "response_length", "perplexity", "entropy", "eos_fraction"]
METRICS += ["policy_loss", "value_loss", "approx_kl", "clip_fraction", "value_clip_fraction", "explained_variance"]
METRICS += ["advantage_std", "return_mean", "grad_norm_policy", "grad_norm_critic"]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """The results of one run.

    curves: metric -> means per bin of BIN steps, critic pre-training excluded: METRICS (without a critic, those
    that there are), `gold`, and `paper_perplexity`, exp(NLL per token / response length), which the paper's plots seem
    to show. tax: increase of the NLL of held-out
    human replies since SFT, nats per token. seconds: number of steps * median seconds per step. machine: instruction
    set of the CPU (AVX2, AVX512), which determines the rounding.
    """

    setting: str
    seed: int
    hash: str
    commit: str
    seconds: float
    tax: float
    curves: dict[str, list[float]]
    machine: str

    @property
    def steps(self) -> int:
        """Number of steps after the critic's pre-training."""
        return BIN * len(self.curves["gold"])

    def start(self, name: str) -> float:
        """Returns the mean of the first bin."""
        return self.curves[name][0]

    def end(self, name: str) -> float:
        """Returns the mean over the last tenth of the bins."""
        values = self.curves[name]
        return fmean(values[-max(1, len(values) // 10) :])

    def change(self, name: str) -> float:
        """Returns `end` minus `start`."""
        return self.end(name) - self.start(name)

    def part(self, name: str, fifth: int) -> float:
        """Returns the mean over one fifth of the run, numbered from 0."""
        values = self.curves[name]
        return fmean(values[fifth * len(values) // 5 : (fifth + 1) * len(values) // 5])

    def smooth(self, name: str, width: int) -> list[float]:
        """Returns the moving average over `width` bins."""
        values = self.curves[name]
        return [fmean(values[end - width : end]) for end in range(width, len(values) + 1)]

    def until(self, step: int) -> "Run":
        """Returns the run up to a step; `tax` remains that of the end."""
        return replace(self, curves={name: values[: step // BIN] for name, values in self.curves.items()})


def read_run(folder: Path, setting: str, seed: int, hash: str, tax: float) -> Run:
    """Returns the results of a finished run from its metrics.jsonl and samples.jsonl."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    pretraining = config["critic_pretrain_steps"]
    golds = gold_means(folder / "samples.jsonl")
    rows, seconds = [], []
    for line in (folder / "metrics.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        seconds.append(row["seconds_rollout"] + row["seconds_score"] + row["seconds_update"])
        if row["step"] <= pretraining:
            continue
        paper = exp(log(row["perplexity"]) / row["response_length"]) if row["response_length"] else 1.0
        rows.append({**row, "gold": golds[row["step"]], "paper_perplexity": paper})
    names = [name for name in (*METRICS, "gold", "paper_perplexity") if name in rows[0]]
    bins = [rows[start : start + BIN] for start in range(0, len(rows), BIN)]
    curves = {name: [rounded(fmean(row[name] for row in bin)) for bin in bins] for name in names}
    commit, spent = (config["git_commit"] or "")[:7], round(len(seconds) * median(seconds))
    machine = torch.backends.cpu.get_cpu_capability()
    return Run(setting, seed, hash, commit, spent, rounded(tax), curves, machine)


def rounded(value: float) -> float:
    """Returns the value rounded to five significant digits."""
    return float(f"{value:.5g}")


def gold_means(samples: Path) -> dict[int, float]:
    """Returns step -> mean gold score of its samples."""
    answers = defaultdict(list)
    for line in samples.open(encoding="utf-8"):
        row = json.loads(line)
        answers[row["step"]].append(row["answer"])
    return {step: fmean(gold(texts)) for step, texts in answers.items()}


def save_run(run: Run) -> None:
    """Stores a run in its setting's results, which are committed."""
    runs = [other for other in load_runs(run.setting) if other.seed != run.seed]
    runs = sorted([*runs, run], key=lambda run: run.seed)
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(run)) for run in runs)
    (RESULTS / f"{run.setting}.json").write_text(f"[\n{lines}\n]\n")


def load_runs(setting: str, count: int | None = None) -> list[Run]:
    """Returns the first `count` stored runs of a setting, by seed."""
    file = RESULTS / f"{setting}.json"
    if not file.exists():
        return []
    return [Run(**record) for record in islice(json.loads(file.read_text("utf-8")), count)]
