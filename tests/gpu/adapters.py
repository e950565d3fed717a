"""Adapters: a tiny run's metrics on the GPU are those of the CPU; a 7B policy's pass: speed, memory, `--plan`."""

import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.ppo_step import forward_flops
from benchmarks.random_inputs import MODELS, config_of, random_lm
from benchmarks.timing import GIB, matrix_rate
from ppo.config import PPOConfig
from ppo.models import PolicyModel
from ppo.planning.plan import PHASES, plan
from ppo.planning.shapes import models_of
from tests.gpu.passes import RESPONSE, ROWS, TOKENS, backward, random_rollout, run
from tests.gpu.report import Report
from tests.gpu.tiny_runs import distance, flags_of, start, wait_for
from tests.gpu.tiny_runs import run as run_tiny
from tests.helpers.tiny_run import build_inputs
from utils.engine.engine import device
from utils.models.adapters import train_adapter
from utils.models.load import enable_checkpointing, training_mode

TOLERANCE = 1e-4
FLAGS = {"lora_rank": 4, "lr": 1e-3, "export": "both"}
AIM = 0.25  # of the measured matrix rate, in useful FLOPs: a forward and a backward without gradients of frozen weights


def check(toy: bool, report: Report) -> None:
    """Figures: the largest relative difference of a metric; seconds, share of the matrix rate, GiB of the planned."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = build_inputs(folder / "inputs")
        on_cpu = start(flags_of(inputs, folder / "cpu", **FLAGS), folder / "cpu.log", on_cpu=True)
        code = run_tiny(flags_of(inputs, folder / "gpu", **FLAGS))
        report.expect(wait_for(on_cpu, folder / "cpu.log", report.seconds_left()) == 0, "the CPU's run fails")
        far, worst = distance(folder / "gpu", folder / "cpu")
        report(off_by=far, worst_metric=worst)
        report.expect(code == 0, f"the run ends with exit code {code}")
        report.expect(far <= TOLERANCE, f"{worst} is off by {far:.1e}, limit {TOLERANCE}")
        update_7b(toy, report, folder)


def update_7b(toy: bool, report: Report, folder: Path) -> None:
    """Measures forward and backward of the policy with recomputed layers."""
    name, shrink = ("tiny", 64) if toy else ("7B", 1)
    config_of(MODELS[name]).save_pretrained(folder / "config")
    config = PPOConfig(
        policy_model_path=str(folder / "config"), critic_model_path=str(folder / "config"), data_path="-", dtype="bf16",
        gradient_checkpoint=True, maxlen_prompt=TOKENS // ROWS // shrink, maxlen_res=RESPONSE // shrink,
        micro_batch_tokens=TOKENS // shrink, lora_rank=16,
    )  # fmt: skip
    rows, column = plan(config, 1).rows, PHASES.index("backward")
    planned = sum(rows[key][column] for key in ("weights of the policy", "activations", "logits"))
    planned += 8 * sum(models_of(config)[0]["policy"].adapters)  # float32, and gradients of their size
    lm = random_lm(MODELS[name], torch.bfloat16, device())
    enable_checkpointing(lm)
    model = PolicyModel(lm)
    train_adapter(model, model.decoder, "policy", config)
    training_mode(model)
    rollout = random_rollout(TOKENS // ROWS // shrink, RESPONSE // shrink)
    useful = 2 * forward_flops(model, rollout, with_head=True)
    rate = matrix_rate(device(), torch.bfloat16, 128 if toy else None)
    figures = run(partial(backward, model, rollout), useful / rate, planned / GIB)
    report(aim=AIM, planned_gib=planned / GIB, **{f"update_{key}": value for key, value in figures.items()})
