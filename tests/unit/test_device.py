"""The device of a process: DS_ACCELERATOR=cpu keeps everything on the CPU, whatever GPUs there are."""

import subprocess
import sys

import pytest
import torch

from tests.helpers.parts import ppo_config, tiny_policy
from tests.helpers.tiny_run import REPOSITORY, clean_environment, read_metrics, run_flags
from train_ppo import main
from utils.device import device, on_gpu
from utils.engine.engine import TrainEngine
from utils.run.logger import Stopwatch
from utils.tensors import to_device

# Reports two GPUs as a machine with GPUs does, and raises an error where CUDA is started.
GPU_MACHINE = """
import sys
import torch

def refuse(*_, **__):
    raise AssertionError("CUDA was to be started")

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda._lazy_init = refuse
"""


def run_there(code: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the code in a process that believes it has two GPUs."""
    before = {key: value for key, value in clean_environment().items() if key != "DS_ACCELERATOR"}
    command, options = [sys.executable, "-c", GPU_MACHINE + code, *argv], {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=REPOSITORY, env=before | environment, timeout=120, **options)


def test_each_process_has_the_gpu_that_its_launcher_names():
    code = "from utils.device import device; print(device())"
    assert run_there(code).stdout == "cuda:0\n"
    assert run_there(code, LOCAL_RANK="1").stdout == "cuda:1\n"
    assert run_there(code, LOCAL_RANK="1", DS_ACCELERATOR="cpu").stdout == "cpu\n"


def test_more_processes_than_gpus_are_a_mistake_of_the_user_unless_slurm_shows_each_task_its_own():
    """(number of GPUs, LOCAL_RANK, SLURM_LOCALID) -> the LOCAL_RANK that is used, and what happens then."""
    code = """
import os
from utils.engine.engine import init_distributed
torch.cuda.set_device = refuse
for gpus, rank, task in ((2, "2", ""), (1, "1", "0"), (1, "1", "1")):
    torch.cuda.device_count = lambda: gpus
    os.environ |= {"LOCAL_RANK": rank, "SLURM_LOCALID": task}
    try:
        init_distributed()
    except Exception as error:
        print(os.environ["LOCAL_RANK"], repr(error))
"""
    result = run_there(code, RANK="2", WORLD_SIZE="3", DS_ACCELERATOR="cuda")
    many, other, shown = result.stdout.splitlines()
    assert many.startswith("2 UserError('local rank 2 has no GPU; this node has 2"), result.stderr
    assert other.startswith("1 UserError('local rank 1 has no GPU; this node has 1")
    assert shown == "0 AssertionError('CUDA was to be started')"


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_deepspeed_does_not_wait_for_the_device_in_forwards_and_steps(single_process, monkeypatch, zero_stage):
    """Its throughput timer would from the third step on."""
    from deepspeed.accelerator import get_accelerator

    waits = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(1))
    engine = TrainEngine(tiny_policy(), ppo_config(zero_stage=zero_stage), "policy")
    for _ in range(4):
        engine.backward(engine(torch.tensor([[1, 5, 7]]), torch.tensor([[False, True, True]]))[0].sum())
        engine.measure()
        engine.apply(1e-3)
    assert not waits


def test_a_run_that_is_told_to_use_the_cpu_starts_no_gpu(inputs, tmp_path):
    """And its numbers are those of a machine without any: checkpoints and evaluation included."""
    code = "from train_ppo import main; main(sys.argv[1:])"
    flags = {"train_steps": 1, "checkpoint_per_step": 1}
    result = run_there(code, *run_flags(inputs, tmp_path / "there", **flags), DS_ACCELERATOR="cpu")
    assert result.returncode == 0, result.stderr[-3000:]
    main(run_flags(inputs, tmp_path / "here", **flags))
    assert read_metrics(tmp_path / "there") == read_metrics(tmp_path / "here")
    assert "CPU cores" in (tmp_path / "there" / "config.json").read_text()


@pytest.mark.gpu
def test_a_lap_waits_for_the_gpu():
    """Products that are given to it in a few milliseconds count as the lap's own."""
    matrix = torch.ones(8192, 8192, device=device(), dtype=torch.bfloat16)
    matrix @ matrix
    watch = Stopwatch()
    watch.lap("before")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(300):
        matrix @ matrix
    end.record()
    watch.lap("products")
    seconds = watch.metrics(1, 1)["seconds_products"]
    assert on_gpu() and end.query()
    assert seconds == pytest.approx(start.elapsed_time(end) / 1000, rel=0.2)


@pytest.mark.gpu
def test_rollouts_are_put_together_and_taken_apart_without_waiting_for_the_gpu():
    from ppo.rollout import assemble, response_ids

    responses = [torch.tensor(ids, device=device()) for ids in ([5, 6, 2], [2], [7])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        rollout = assemble([[1, 7, 8], [1, 9], [1]], responses, 2, 0)
        chosen = rollout.rows([2, 0])
        again = rollout.rows(to_device(torch.tensor([2, 0]), device()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert response_ids(chosen) == response_ids(again) == [[7], [5, 6, 2]]
