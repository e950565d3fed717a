"""The alignment tax: `python -m ppo.benchmark --models BEFORE AFTER --tasks T [T …] [--task_path DIR]`.

lm-eval asks both policies the same items. The table has both results with their standard errors, and the mean paired
difference over items with its 95 % interval (normal).
"""

import math
import os
import statistics

from ppo.benchmark_flags import BenchmarkConfig
from utils.flags.parser import entry_point, parse_args

Items = dict[str, dict[str, list[float]]]  # task -> metric -> a number per item


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Prints the table; one process."""
    config = parse_args(BenchmarkConfig, argv)
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read when datasets is imported
    os.environ.setdefault("HF_EVALUATE_OFFLINE", os.environ["HF_DATASETS_OFFLINE"])  # of metrics
    from ppo.benchmark_run import evaluate_policies
    from utils.files import check_output_file, write_json

    if config.output:
        check_output_file(config.output, "--output")
    before, after = evaluate_policies(config)
    rows = compare(before, after)
    print(render(rows, config))
    if config.output:
        items = {name: found["items"] for name, found in (("before", before), ("after", after))}
        write_json(config.output, {"models": config.models, "table": rows, "items": items}, "--output")
        print(f"written to {config.output}")


def compare(before: dict, after: dict) -> list[dict]:
    """Returns a row per task and metric: numbers and standard errors of both, and their difference if items have one.

    before, after: {"results": task -> metric -> (number, standard error or None), "items": Items}.
    """
    rows = []
    for task, metrics in before["results"].items():
        for metric, first in metrics.items():
            second = after["results"][task][metric]
            row = {"task": task, "metric": metric, "before": first, "after": second, "difference": None}
            pair = [found["items"].get(task, {}).get(metric) for found in (before, after)]
            if None not in pair and is_mean(first[0], pair[0]) and is_mean(second[0], pair[1]):
                row |= {"items": len(pair[0]), "difference": paired_difference(*pair)}
            rows.append(row)
    return rows


def is_mean(number: float, items: list[float]) -> bool:
    """Whether a metric is the mean of its items, so that differences of items say how sure it is."""
    return math.isclose(number, statistics.fmean(items), rel_tol=1e-6, abs_tol=1e-9)


def paired_difference(before: list[float], after: list[float]) -> list[float] | None:
    """Returns [mean difference, low, high], 95 %, normal; None for fewer than two items."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    if len(differences) < 2:
        return None
    mean = statistics.fmean(differences)
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return [mean, mean - half, mean + half]


def render(rows: list[dict], config: BenchmarkConfig) -> str:
    """Returns the table as text."""
    texts = [["task", "metric", "before", "after", "after - before", "items"]]
    for row in rows:
        cells = (f"{x:.4f}" + (f" ± {error:.4f}" if error is not None else "") for x, error in map(row.get, SIDES))
        change = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row["difference"]) if row["difference"] else ""
        texts.append([row["task"], row["metric"], *cells, change, str(row.get("items", ""))])
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [f"before: {config.models[0]}, after: {config.models[1]}; ± standard error, [95 % interval over items]"]
    lines += ["  ".join(f"{x:{w}}" for x, w in zip(row, widths, strict=True)).rstrip() for row in texts]
    return "\n".join(lines)


SIDES = ("before", "after")

if __name__ == "__main__":
    main()
