"""Two ranks on one device over gloo: the metrics are those of one rank, under ZeRO-2 and 3."""

import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ppo.build import build
from ppo.config import AMOUNTS, PRESETS, PPOConfig
from tests.gpu.report import Report
from tests.gpu.tiny_runs import distance, flags_of, start, wait_for
from tests.helpers.tiny_run import build_inputs, clean_environment
from train_ppo import loop
from utils.engine.engine import deepspeed, device, init_distributed, shutdown_distributed
from utils.flags.parser import parse_args
from utils.launcher import free_port
from utils.watchdog import Watchdog

TOLERANCE = 1e-4
SETTINGS = {"zero_2": {"zero_stage": 2}, "zero_3": {"zero_stage": 3}}
OTHER = "import json, sys; from tests.gpu.two_ranks import runs; runs(1, sys.argv[1], *map(json.loads, sys.argv[2:]))"


def check(toy: bool, report: Report) -> None:
    """Figures: the largest relative difference of a metric per stage, and which metric it is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs, port, worst = build_inputs(folder / "inputs"), str(free_port()), {}
        alone = start(flags_of(inputs, folder / "alone"), folder / "alone.log")
        flags = [flags_of(inputs, folder / setting, hang_timeout=50, **zero) for setting, zero in SETTINGS.items()]
        other = subprocess.Popen([sys.executable, "-c", OTHER, port, *map(json.dumps, flags)], env=clean_environment())
        runs(0, port, *flags)
        report.expect(other.wait(report.seconds_left()) == 0, "the other rank fails")
        report.expect(wait_for(alone, folder / "alone.log", report.seconds_left()) == 0, "one rank alone fails")
        for setting in SETTINGS:
            far, worst[setting] = distance(folder / setting, folder / "alone")
            report(**{setting: far}, worst_metric=worst)
            report.expect(far <= TOLERANCE, f"{setting}: {worst[setting]} is off by {far:.1e}, limit {TOLERANCE}")
            ranks = json.loads((folder / setting / "config.json").read_text())["world_size"]
            report.expect(ranks == 2, f"{setting} ran on {ranks} ranks, expected 2")


def runs(rank: int, port: str, *flags: list[str]) -> None:
    """The work of each rank: tiny runs, one after the other in the same group."""
    join(rank, port)
    for each in flags:
        run = build(parse_args(PPOConfig, each, PRESETS, AMOUNTS))
        with Watchdog(run.config.hang_timeout), contextlib.closing(run.logger), run.lifecycle:
            loop(run)
    shutdown_distributed()


def join(rank: int, port: str) -> None:
    """A group of two on the first device. NCCL takes one rank per GPU only, gloo any number."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if device().type == "cuda":
        torch.cuda.set_device(device())
    deepspeed.ops.__compatible_ops__ = {}  # as in `init_distributed` on a CPU: no build of what is not used
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    init_distributed()  # joins what is there
