"""A frozen 7B model to the GPU and back: through pageable memory both ways, as before, and the way that is used now."""

import contextlib

import torch
from torch import nn

from benchmarks.random_inputs import MODELS, random_lm
from benchmarks.timing import timed
from reward.scoring.ensemble import Frozen
from utils.engine.engine import device

ROUNDS = 2
LEAST = 30  # seconds that are left for the new way, however slow the old one is


def check(toy: bool, report) -> None:
    """Figures: seconds per scoring and GB per second of both ways, seconds and memory that the new one takes once."""
    model = random_lm(MODELS["tiny" if toy else "7B"], torch.bfloat16, device()).requires_grad_(False)
    size = sum(p.nbytes for p in model.parameters())
    before = sums(model)
    report(model_gb=size / 1e9)
    for _ in range(ROUNDS):  # the second time stands for all that follow
        _, out = timed(model.to, "cpu")
        _, into = timed(model.to, device())
        report(old_s=out + into, old_in_gb_per_s=size / into / 1e9, old_out_gb_per_s=size / out / 1e9)
        if not toy and report.seconds_left() < LEAST:
            break

    frozen, pinning = timed(Frozen, model, True)
    on_device = torch.cuda.memory_allocated() if device().type == "cuda" else 0
    report(new_once_s=pinning, left_on_device_gb=on_device / 1e9)
    for _ in range(ROUNDS):
        with contextlib.ExitStack() as stack:
            _, into = timed(stack.enter_context, frozen.resident())
            found, places = sums(model), {p.device for p in model.parameters()}
            _, out = timed(stack.close)
    report(new_s=into + out, new_in_gb_per_s=size / into / 1e9, new_out_s=out)
    wrong = int((found != before).sum())
    report.expect(not wrong, f"{wrong} of {len(before)} parameters have changed on their way to the device")
    report.expect(places == {device()}, f"scoring finds the weights on {places}, expected {device()}")
    wrong = int((sums(model) != before).sum())
    report.expect(not wrong, f"{wrong} of {len(before)} parameters have changed in host memory")
    report.expect(on_device < 0.01 * size or toy, f"{on_device / 1e9:.2f} GB stayed on the device, expected none")


def sums(model: nn.Module) -> torch.Tensor:
    """The sum of each parameter's bits, as integers: int64 [parameters], in host memory."""
    return torch.stack([p.view(torch.int16).sum(dtype=torch.int64) for p in model.parameters()]).cpu()
