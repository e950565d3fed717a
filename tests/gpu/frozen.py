"""A frozen 7B model is brought to the GPU for scoring and off it again, through page-locked memory."""

import contextlib

import torch
from torch import nn

from benchmarks.random_inputs import MODELS, random_lm
from benchmarks.timing import timed
from reward.scoring.ensemble import Frozen
from utils.engine.engine import device


def check(toy: bool, report) -> None:
    """Figures: seconds and GB per second of a round trip, seconds and memory that page-locking takes once."""
    model = random_lm(MODELS["tiny" if toy else "7B"], torch.bfloat16, device()).requires_grad_(False)
    size = sum(p.nbytes for p in model.parameters())
    before = sums(model)
    frozen, pinning = timed(Frozen, model, True)
    on_device = torch.cuda.memory_allocated() if device().type == "cuda" else 0
    report(model_gb=size / 1e9, new_once_s=pinning, left_on_device_gb=on_device / 1e9)
    for _ in range(2):  # the second time stands for all that follow
        with contextlib.ExitStack() as stack:
            _, into = timed(stack.enter_context, frozen.resident())
            found, places = sums(model), {p.device for p in model.parameters()}
            _, out = timed(stack.close)
    report(new_s=into + out, new_in_gb_per_s=size / into / 1e9, new_out_s=out)
    for where, now in (("on the device", found), ("in host memory", sums(model))):
        wrong = int((now != before).sum())
        report.expect(not wrong, f"{wrong} of {len(before)} parameters have changed {where}")
    report.expect(places == {device()}, f"scoring finds the weights on {places}, expected {device()}")
    report.expect(on_device < 0.01 * size or toy, f"{on_device / 1e9:.2f} GB stayed on the device, expected none")


def sums(model: nn.Module) -> torch.Tensor:
    """The sum of each parameter's bits, as integers: int64 [parameters], in host memory."""
    return torch.stack([p.view(torch.int16).sum(dtype=torch.int64) for p in model.parameters()]).cpu()
