"""The training loop of the supervised stages: step, evaluate, save the best. A `Stage` says what is learnt."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from utils.distributed import barrier, is_main, ranks_where, sum_ranks
from utils.engine.engine import TrainEngine, device, shutdown_distributed
from utils.errors import UserError
from utils.files import write_json
from utils.flags.supervised import FitConfig
from utils.report.verdict import judge_supervised
from utils.run.ending import end_run
from utils.run.export import export_models
from utils.run.index import record
from utils.run.lifecycle import RunLifecycle
from utils.run.logger import RunLogger
from utils.run.restore import Best, Checkpoint, TrainerState
from utils.run.start import open_log
from utils.run.together import together
from utils.schedule import lr_factor
from utils.watchdog import report_progress

Item = object  # one example of the stage's data: a dataclass that can be written as JSON


class FitState(TrainerState):
    """What a checkpoint of `fit` holds. stage: `Stage.state`."""

    best: Best | None
    stage: dict[str, float]


class BadStep(UserError):
    """A batch whose loss or gradient is not finite or too large; no step was made."""


@dataclass(frozen=True)
class Stage:
    """What a stage learns: sums over items, and the counts that divide them.

    `sums(engine, items)` returns float32 scalars by name; `counts(items)` their denominators, from the data. The loss
    is the sum of `loss_weights[name] * sum / count` over the global batch: micro-batches and ranks do not change it.
    """

    batches: Iterator[list[Item]]
    length: Callable[[Item], int]  # tokens of an item in a forward pass
    plan: Callable[[list[int]], list[tuple[list[int], float]]]  # lengths -> this rank's (indices, weight) per forward
    sums: Callable[[TrainEngine, list[Item]], dict[str, torch.Tensor]]
    counts: Callable[[list[Item]], dict[str, float]]
    loss_weights: dict[str, float]
    best_by: str  # a metric of the evaluation
    larger_is_better: bool
    save: Callable[[dict[str, torch.Tensor], str], None]  # (whole weights, folder), on rank 0
    save_adapter: Callable[[str], None]  # (folder), on rank 0
    prepare: Callable[[TrainEngine, list[Item]], list[Item]] | None = None  # replaces a batch before its forwards
    evaluate: Callable[[TrainEngine, list[Item]], dict[str, float]] | None = None  # instead of the means over items
    samples: Callable[[TrainEngine], list[dict]] | None = None  # rows that an evaluation writes to samples.jsonl
    tokenizer: PreTrainedTokenizerBase | None = None  # that `save` writes
    state: dict = field(default_factory=dict)  # JSON that checkpoints keep, changed in place


def fit(engine: TrainEngine, stage: Stage, valid: list[Item], config: FitConfig, start: Checkpoint | None) -> None:
    """Trains for --train_steps; evaluates every --save_per_step and at the end; writes best/ and final/. Collective.

    start: the checkpoint to resume from. Leaves the process group at the end, and the process if a signal stopped the
    run. Raises UserError on all ranks, before the weights change, if the loss or the gradient norm is not finite or
    beyond --explosion_limit.
    """
    lifecycle = RunLifecycle(config, {"model": engine}, config.train_steps)
    lifecycle.restore(start, config.seed)
    done, best = 0, None
    if start:
        done, best = start.step, start.state["best"]
        stage.state.update(start.state["stage"])
        for _ in range(done):  # the order of the data depends only on the seed
            next(stage.batches)
    log = open_log(config, start, config.train_steps)
    with together(), contextlib.closing(log), lifecycle:
        _loop(engine, stage, valid, config, log, lifecycle, done, best)
        if not lifecycle.exit_code and (problem := export(engine, stage, config, "final")):
            raise UserError(problem)
    ends = is_main()
    shutdown_distributed()
    if ends:
        end_run(config, log.say, judge_supervised, is_finished=not lifecycle.exit_code)
    if lifecycle.exit_code:
        sys.exit(lifecycle.exit_code)


def _loop(
    engine: TrainEngine, stage: Stage, valid: list[Item], config: FitConfig, log: RunLogger, lifecycle: RunLifecycle,
    done: int, best: float | None,
) -> None:  # fmt: skip
    """Makes the steps after the first `done`. best: the evaluation of best/, negated if smaller is better."""
    for step in range(done, config.train_steps):
        started = time.perf_counter()
        lr = config.lr * lr_factor(step, config.warmup_steps, config.train_steps, config.lr_schedule)
        items = next(stage.batches)
        try:
            metrics = train_step(engine, stage, items, lr)
        except BadStep as error:
            lifecycle.finish_checkpoint()
            kept = keep_batch(config.model_save_path, step + 1, items)
            if is_main():
                end_run(config, log.say, judge_supervised, is_finished=False)
            barrier()  # a launcher kills all ranks when one ends
            raise UserError(f"{error} [{kept}]") from None
        tokens = sum(map(stage.length, items))
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - started)
        done = step + 1
        log.show(done, metrics)
        if valid and (done % config.save_per_step == 0 or done == config.train_steps):
            report_progress("training step")
            evaluation = stage.evaluate(engine, valid) if stage.evaluate else evaluate(engine, stage, valid)
            report_progress("evaluation")
            held_out = {f"eval_{name}": value for name, value in evaluation.items()}
            metrics |= held_out
            log.say(f"step {done}: {numbers(held_out)}")
            if stage.samples:
                log.samples(done, stage.samples(engine))
            value = evaluation[stage.best_by] * (1 if stage.larger_is_better else -1)
            if not math.isnan(value) and (best is None or value > best):
                said = f"step {done}: best eval_{stage.best_by} so far"
                if problem := export(engine, stage, config, "best", {"step": done, **held_out}):
                    log.say(f"warning: {said}, but not saved: {problem}")
                else:
                    best = value
                    log.say(f"{said}, saved to {config.model_save_path}/best")
        log.metrics(done, metrics)
        log.advance()
        lifecycle.after_step({"step": done, "best": best, "stage": stage.state}, log.say)
        if lifecycle.exit_code:
            break


def train_step(engine: TrainEngine, stage: Stage, items: list[Item], lr: float) -> dict[str, float]:
    """Makes one optimizer step on the global batch `items`; returns metrics, equal on all ranks. Raises BadStep."""
    engine.module.train()
    items = stage.prepare(engine, items) if stage.prepare else items
    counts = stage.counts(items)
    totals = torch.zeros(len(counts), device=device())
    for part, weight in stage.plan([stage.length(item) for item in items]):
        sums = stage.sums(engine, [items[i] for i in part])
        engine.backward(weight * sum(w * sums[name] / counts[name] for name, w in stage.loss_weights.items()))
        totals += weight * torch.stack([sums[name].detach() for name in counts])
    metrics = _means(stage, totals, counts)
    check_number("loss", metrics["loss"], engine, lambda: not bool(totals.isfinite().all()))
    norm = engine.measure()
    check_number("gradient norm", norm, engine, engine.bad_gradient)
    engine.apply(lr)
    return metrics | {"lr": lr, "grad_norm": norm}


@torch.no_grad()
def evaluate(engine: TrainEngine, stage: Stage, items: list[Item]) -> dict[str, float]:
    """Returns the metrics of `train_step` over held-out items. Collective."""
    engine.module.eval()
    counts = stage.counts(items)
    totals = torch.zeros(len(counts), device=device())
    for part, weight in stage.plan([stage.length(item) for item in items]):
        sums = stage.sums(engine, [items[i] for i in part])
        totals += weight * torch.stack([sums[name] for name in counts])
    return _means(stage, totals, counts)


def _means(stage: Stage, totals: torch.Tensor, counts: dict[str, float]) -> dict[str, float]:
    sums = sum_ranks(totals).tolist()
    means = {name: total / count for (name, count), total in zip(counts.items(), sums, strict=True)}
    loss = {"loss": sum(w * means[name] for name, w in stage.loss_weights.items())}
    if len(stage.loss_weights) == 1:  # the only term equals the loss
        means = {name: mean for name, mean in means.items() if name not in stage.loss_weights}
    return loss | means


def check_number(name: str, value: float, engine: TrainEngine, is_own: Callable[[], bool]) -> None:
    """Raises BadStep if a number is not finite or beyond --explosion_limit. is_own: whether it is this rank's."""
    if abs(value) <= engine.explosion_limit:
        return
    beyond = ", beyond --explosion_limit" if math.isfinite(value) else ""
    raise BadStep(
        f"the {name} is {value:g}{beyond} (rank {ranks_where(is_own())}); no step was made. Lower --lr, raise "
        "--warmup_steps, or use --dtype fp32"
    )


def keep_batch(folder: str, step: int, items: list[Item]) -> str:
    """Writes a global batch to bad_batches/ on rank 0; returns step and path for an error message. Collective."""
    path, refusal = os.path.join(folder, "bad_batches", f"step_{step}.json"), None
    if is_main():
        try:
            record(folder, "bad_batches", os.path.basename(path))
            write_json(path, [asdict(item) for item in items])
        except UserError as error:
            refusal = error
    barrier()
    return f"step {step}, batch not saved: {refusal}" if refusal else f"step {step}, batch in {path}"


def export(
    engine: TrainEngine, stage: Stage, config: FitConfig, name: str, metrics: dict[str, float] | None = None
) -> str | None:  # fmt: skip
    """Writes the current weights to a run's folder `name`. Returns why it could not be written, or None. Collective.

    metrics: as of `export_models`.
    """
    state = engine.full_state_dict() if config.export != "adapter" else {}
    return export_models(
        config, name, stage.tokenizer, lambda folder: stage.save(state, folder), stage.save_adapter, metrics
    )


def numbers(metrics: dict[str, float]) -> str:
    """Returns metrics as one line of text, `loss 0.693  lr 1e-05 …`."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
