"""DeepSpeed's optimizer step of ZeRO-1 and 2, made chunk by chunk: no flat copies of the gradient, a fast norm.

DeepSpeed joins the gradients to one flat tensor, casts that to float32, scales it, runs AdamW over it and casts the
weights back: 6 bytes a parameter that live for the step alone, at its peak, and on a CPU most of the step's time goes
into passes over memory, and into the pages of those copies. Here each pass takes a chunk that stays in the cache.
"""

import types

import torch
from torch.optim.adamw import adamw

from utils.distributed import sum_ranks

NORM_CHUNK = 1 << 16  # a CPU adds up squares in float32 one after the other: 2e-6 off for so many, 3e-4 for 16 million
CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 26  # elements: what a core's cache holds; few launches, 256 MB


def use_chunked_step(optimizer) -> None:
    """optimizer: DeepSpeed's for ZeRO-1 or 2, not offloaded, around a fused torch.optim.AdamW."""
    optimizer.get_grad_norm_direct = lambda gradients, _: gradient_norm(gradients)
    optimizer.step = types.MethodType(chunked_step, optimizer)


def gradient_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all elements on all ranks, a float32 scalar; not finite where one of them is not. Collective.

    DeepSpeed's own casts every tensor to float64 first. Squares that float32 cannot hold (elements beyond 1e19) give
    infinity, which refuses the step.
    """
    if gradients[0].device.type == "cpu":
        gradients = [chunk for gradient in gradients for chunk in gradient.flatten().split(NORM_CHUNK)]
    norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))
    return sum_ranks(norms.double().square().sum()).sqrt().float()


@torch.no_grad()
def chunked_step(optimizer) -> None:
    """Takes the place of DeepSpeed's `step`: the same numbers, but for the rounding of the norm. Collective."""
    norm = optimizer.scaled_global_norm()
    optimizer.overflow = not bool(norm.isfinite())
    optimizer._global_grad_norm = norm
    scale = 1 / ((norm + 1e-6) / optimizer.clip_grad).clamp(min=1) if optimizer.clip_grad else None
    for i, master in enumerate(optimizer.single_partition_of_fp32_groups):
        if not optimizer.overflow:
            adam_in_chunks(optimizer.optimizer, i, master.detach(), optimizer.averaged_gradients[i], scale)
        optimizer.averaged_gradients[i] = optimizer.all_grad_tensors[i] = None
    if not optimizer.overflow:
        optimizer.update_lp_params()  # the weights that the forward reads


def adam_in_chunks(
    adam: torch.optim.AdamW, i: int, master: torch.Tensor, gradients: list[torch.Tensor], scale: torch.Tensor | None
) -> None:
    """One step of parameter group i. master: its flat weights, which `gradients` cover in this order, times `scale`."""
    group, state = adam.param_groups[i], adam.state[adam.param_groups[i]["params"][0]]
    if not state:
        state["step"] = torch.zeros((), device=master.device)
        state |= {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
    tensors = [master, state["exp_avg"], state["exp_avg_sq"]]
    options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize", "fused")}
    beta1, beta2 = group["betas"]
    size, start = CPU_CHUNK if master.device.type == "cpu" else GPU_CHUNK, 0
    for gradient in (chunk for tensor in gradients for chunk in tensor.flatten().split(size)):
        weight, first, second = (x[start : start + len(gradient)] for x in tensors)
        gradient = gradient.float() if scale is None else gradient.float().mul_(scale)
        step = state["step"].clone()  # AdamW counts in it, once a call
        adamw([weight], [gradient], [first], [second], [], [step], beta1=beta1, beta2=beta2, **options)
        start += len(gradient)
    state["step"] += 1
