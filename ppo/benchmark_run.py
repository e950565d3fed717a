"""Runs lm-eval on policies that this toolkit loads. The only file that imports lm-eval."""

import importlib.util
import logging
import math
from typing import Any

from ppo.benchmark_flags import BenchmarkConfig
from ppo.finished_policies import load_policy, prepare_policies
from utils.errors import UserError
from utils.files import first_names


def evaluate_policies(config: BenchmarkConfig) -> list[dict]:
    """Returns what `ppo.benchmark.compare` reads of each policy; one is in memory at a time.

    Tasks are loaded before any weights. Raises UserError without lm-eval, and for tasks that cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("ppo.benchmark: lm-eval is not installed; run pip install lm-eval==0.4.13")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = _load_tasks(config)
    tokenizer, _ = prepare_policies(config, [("--models", path) for path in config.models])
    return [_evaluate(path, tasks, tokenizer, config) for path in config.models]


def _load_tasks(config: BenchmarkConfig) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    own = config.task_path or None
    manager = TaskManager(include_path=own, include_defaults=not own)  # lm-eval's own take many seconds to list
    if unknown := [task for task in config.tasks if task not in manager.all_tasks]:
        what = f"not in --task_path {own}, which has {first_names(manager.all_tasks) or 'none'}"
        raise UserError(f"--tasks {unknown[0]}: {what if own else 'not a task of lm-eval; --task_path reads your own'}")
    try:
        return manager.load(config.tasks)
    except Exception as error:  # of datasets, of lm-eval, and of a task's own code
        advice = "the data must be on this machine: get it first, or set HF_DATASETS_OFFLINE=0"
        raise UserError(f"--tasks {' '.join(config.tasks)}: cannot be loaded ({_reason(error)}); {advice}") from error


def _evaluate(path: str, tasks: dict[str, Any], tokenizer, config: BenchmarkConfig) -> dict:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0 or config.num_fewshot is None:  # as lm-eval: 0 in a task's file stays
            task.set_config(key="num_fewshot", value=(own or 0) if config.num_fewshot is None else config.num_fewshot)
        task.set_fewshot_seed(seed=config.seed)
    model = load_policy(path, "--models", config, tokenizer).lm
    print(f"{path}: {', '.join(tasks['tasks'])}")
    lm = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size,
        chat_template_args=config.template_arguments,
    )  # fmt: skip
    try:
        found = evaluate(
            lm, tasks, limit=config.limit or None, bootstrap_iters=1000, apply_chat_template=config.apply_template,
            fewshot_as_multiturn=config.apply_template,
        )  # fmt: skip
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise UserError(f"--tasks {' '.join(config.tasks)}: lm-eval failed ({_reason(error)})") from error
    results = {task: _numbers(numbers) for task, numbers in found["results"].items()}
    return {"results": results, "items": {task: _items(rows) for task, rows in found["samples"].items()}}


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _numbers(found: dict[str, Any]) -> dict[str, list]:
    """Returns metric -> [number, standard error or None] of a task's results, whose keys are `metric,filter`."""
    metrics = {}
    for key, value in found.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            error = found.get(f"{name}_stderr,{kind}")
            known = isinstance(error, int | float) and math.isfinite(error)
            metrics[_label(name, kind)] = [float(value), float(error) if known else None]
    return metrics


def _items(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Returns metric -> a number per item, in the order of items; none for metrics whose items are no numbers."""
    metrics: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["doc_id"]):
        for name in row["metrics"]:
            metrics.setdefault(_label(name, row["filter"]), []).append(row[name])
    return {
        name: [float(x) for x in items] for name, items in metrics.items()
        if all(isinstance(x, int | float) and math.isfinite(x) for x in items)
    }  # fmt: skip


def _label(name: str, kind: str) -> str:
    return name if kind == "none" else f"{name} ({kind})"
