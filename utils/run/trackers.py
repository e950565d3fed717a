"""Experiment trackers of --report_to: config, metrics in groups, samples as tables, and resuming into the same run.

wandb, mlflow and swanlab are called here; others by accelerate, which writes metrics only. Files go to the run's folder
unless a variable of the tracker's own says where. `trackers.json` in that folder holds the ids of the runs.
"""

import dataclasses
import math
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.errors import Say, UserError
from utils.files import read_json, write_json
from utils.flags.run import RunFlags
from utils.run.index import TRACKERS, record
from utils.run.metric_groups import grouped
from utils.schema import Schema
from utils.terminal import printable

PARAMETERS = 100  # that mlflow takes at once
ROWS = 100  # steps per table of mlflow, which reads and writes a whole table to add rows
PATIENCE = 60.0  # seconds for all trackers at the end of a run
Row = dict[str, object]


class TrackerIds(Schema):
    """trackers.json: tracker -> id of the run in it."""

    ids: dict[str, str]


class Tracker(NamedTuple):
    """A run of one tracker, and what it does: metrics(step, values), samples(step, table, rows), close(failed).

    id: by which it is resumed, None if it cannot be. link: where it is shown or stored. The rows have the same keys.
    """

    id: str | None
    link: str
    metrics: Callable[[int, dict[str, float]], object]
    samples: Callable[[int, str, list[Row]], object]
    close: Callable[[bool], object]


def wandb_run(folder: str, project: str, name: str, config: dict, run_id: str | None) -> Tracker:
    """Weights & Biases. `step` is a metric: after a rollback it goes back, which wandb's own step cannot."""
    import wandb

    run_id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    place = os.environ.get("WANDB_DIR") or folder
    run = wandb.init(project=project, name=name, config=config, id=run_id, resume="allow", dir=place)
    run.define_metric("*", step_metric="step")

    def samples(step: int, table: str, rows: list[Row]) -> None:
        cells = [list(row.values()) for row in rows]
        run.log({"step": step, table: wandb.Table(list(rows[0]), cells, allow_mixed_types=True)})

    link = run.url or os.path.dirname(run.dir)
    return Tracker(
        run_id,
        link,
        lambda step, values: run.log({"step": step} | values),
        samples,
        lambda failed: run.finish(int(failed)),
    )


def mlflow_run(folder: str, project: str, name: str, config: dict, run_id: str | None) -> Tracker:
    """MLflow, with a store of files unless MLFLOW_TRACKING_URI names a server or a database."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.entities import Metric, Param

    place = os.environ.get("MLFLOW_TRACKING_URI")
    if not place:
        place = Path(folder, "mlruns").absolute().as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else mlflow 3 refuses it
    client = mlflow.MlflowClient(place)
    if run_id:
        run = client.get_run(run_id)
        client.update_run(run_id, status="RUNNING")
    else:
        experiment = client.get_experiment_by_name(project)
        run = client.create_run(
            experiment.experiment_id if experiment else client.create_experiment(project), run_name=name
        )
        run_id = run.info.run_id
    known, limit = run.data.params, mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
    new = [Param(key, str(value)[:limit]) for key, value in config.items() if key not in known]
    for start in range(0, len(new), PARAMETERS):
        client.log_batch(run_id, params=new[start : start + PARAMETERS])

    def metrics(step: int, values: dict[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        named = {re.sub(r"[^\w./ -]", "_", key): value for key, value in values.items()}
        client.log_batch(run_id, [Metric(key, value, now, step) for key, value in named.items()])

    def samples(step: int, table: str, rows: list[Row]) -> None:
        first = step // ROWS * ROWS
        columns = {"step": [step] * len(rows)} | {key: [row[key] for row in rows] for key in rows[0]}
        client.log_table(run_id, columns, f"{table}_{first:06d}_to_{first + ROWS - 1:06d}.json")

    place = without_password(place)
    link = f"{place}, run {run_id}"
    if place.startswith("http"):
        link = f"{place}/#/experiments/{run.info.experiment_id}/runs/{run_id}"
    close = lambda failed: client.set_terminated(run_id, "FAILED" if failed else "FINISHED")  # noqa: E731
    return Tracker(run_id, link, metrics, samples, close)


def swanlab_run(folder: str, project: str, name: str, config: dict, run_id: str | None) -> Tracker:
    """SwanLab. It drops a step that it already has, as after a rollback."""
    import swanlab

    run_id = run_id or os.environ.get("SWANLAB_RUN_ID") or secrets.token_hex(8)
    place = {} if {"SWANLAB_LOG_DIR", "SWANLAB_LOGDIR"} & os.environ.keys() else {"log_dir": f"{folder}/swanlog"}
    # The process's command line, which it would read from the system, may hold the secret of --notify_url.
    probe = swanlab.Settings(probe=swanlab.Settings.Probe(runtime=False))
    run = swanlab.init(project=project, name=name, config=config, id=run_id, resume="allow", settings=probe, **place)

    def samples(step: int, table: str, rows: list[Row]) -> None:
        shown = swanlab.echarts.Table().add(list(rows[0]), [list(row.values()) for row in rows])
        run.log({table: shown}, step=step)

    def close(failed: bool) -> None:
        run.finish(*(("crashed", "see the log of the run") if failed else ("success",)))

    link = run.url if run.mode == "online" else str(run.dir)
    return Tracker(run_id, link, lambda step, values: run.log(values, step=step), samples, close)


def accelerate_run(kind: str, folder: str, project: str, config: dict) -> Tracker:
    """Any other tracker that accelerate knows: it gets flags and metrics, but no samples."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers require it
    made = LOGGER_TYPE_TO_CLASS[kind]
    run = made(project, folder) if made.requires_logging_directory else made(project)
    run.start()
    run.store_init_configuration(config)
    metrics = lambda step, values: run.log(values, step=step)  # noqa: E731
    return Tracker(None, f"project {project}", metrics, lambda *_: None, lambda failed: run.finish())


# Tracker -> its function, and its own variables for the names of project and run.
KINDS = {
    "wandb": (wandb_run, "WANDB_PROJECT", "WANDB_NAME"),
    "mlflow": (mlflow_run, "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME"),
    "swanlab": (swanlab_run, "SWANLAB_PROJ_NAME", "SWANLAB_EXP_NAME"),
}
PROJECTS = {"policy": "ppo", "": "run"}  # what is trained -> its project, where that has another name


class Trackers:
    """The trackers of a run, on rank 0. One that fails is left out from then on, with a warning: the run goes on."""

    def __init__(self, config: RunFlags, say: Say):
        self._say, folder = say, config.model_save_path
        self._open: dict[str, Tracker] = {}
        names = tracker_names(config.report_to)
        if not names:
            return
        file = os.path.join(folder, TRACKERS)
        ids = read_json(file, "--report_to", TrackerIds)["ids"] if os.path.lexists(file) else {}
        for name in names:
            try:
                tracker = self._open[name] = _start(name, config, ids.get(name))
            except Exception as error:
                text = without_password(" ".join(str(error).split()))
                advice = "log in to it, or use its offline mode"
                raise UserError(f"--report_to {name}: it cannot start ({text}); {advice}") from error
            say(f"{name}, {'resumed' if name in ids else 'new'} run: {tracker.link}")
        record(folder, TRACKERS)
        write_json(file, {"ids": ids | {name: tracker.id for name, tracker in self._open.items() if tracker.id}})

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Sends a step's finite numbers, in groups."""
        finite = {grouped(key): value for key, value in values.items() if math.isfinite(value)}
        self._each(lambda tracker: tracker.metrics(step, finite))

    def samples(self, step: int, rows: list[Row]) -> None:
        """Sends a step's texts, escaped, as rows of one table, of another one for held-out prompts."""
        shown = [{k: printable(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
        name = "samples_held_out" if rows and rows[0].get("held_out") else "samples"
        self._each(lambda tracker: tracker.samples(step, name, shown) if shown else None)

    def close(self) -> None:
        """Ends the runs, as failed if an exception is on its way. Does not wait for a server longer than PATIENCE."""
        failed = sys.exc_info()[0] is not None
        thread = threading.Thread(target=self._each, args=(lambda tracker: tracker.close(failed),), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        if thread.is_alive():
            self._say(f"warning: --report_to {', '.join(self._open)}: no answer at the end of the run")

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001 - of the network, say
                del self._open[name]
                text = without_password(" ".join(str(error).split()))
                self._say(f"warning: --report_to {name} gets nothing more ({text}); metrics.jsonl has all steps")


def without_password(text: str) -> str:
    """Returns a text whose addresses, as in MLFLOW_TRACKING_URI, name no user and no password."""
    return re.sub(r"://[^/\s@]*@", "://", text)


def tracker_names(report_to: str) -> list[str]:
    """Returns the names in the comma-separated value of --report_to; none for "none"."""
    return [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]


def _start(name: str, config: RunFlags, run_id: str | None) -> Tracker:
    """Begins, or resumes, a run. Flags win over the tracker's own variables, which win over stage and folder."""
    kind, *variables = KINDS.get(name, (None, "", ""))
    given = [os.environ.get(variable) for variable in variables]
    folder = os.path.abspath(config.model_save_path)
    project = config.project or given[0] or PROJECTS.get(config.trains, config.trains)
    flags = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    if not kind:
        return accelerate_run(name, folder, project, flags)
    return kind(folder, project, config.run_name or given[1] or os.path.basename(folder), flags, run_id)
