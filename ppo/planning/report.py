"""`train_ppo.py --plan`: prints the predicted memory and time of a run, and whether it fits its GPUs."""

import os
from dataclasses import replace

from ppo.config import PPOConfig
from ppo.planning.plan import gpu_bytes, plan, with_gathering
from ppo.planning.shapes import models_of
from ppo.planning.step_time import NODE, Phase, checkpoint, phases
from ppo.planning.vllm_memory import GIB, MOVED, PHASES
from utils.engine.memory import ROOM
from utils.errors import UserError
from utils.flags.checks import choose
from utils.memory.recompute import num_layers
from utils.models.load import attention_cap


def print_plan(config: PPOConfig) -> None:
    """Prints tables of memory and time, and whether the run fits its GPUs. Only the first process prints."""
    if int(os.environ.get("RANK", "0")):
        return
    if config.dtype == "auto":
        choose(config, "dtype", "bf16", f"the plan is for {config.plan_gpu} GPUs")
    gpus = config.plan_gpus or int(os.environ.get("WORLD_SIZE", "1"))
    found, (models, rewards) = plan(config, gpus), models_of(config)
    layers = {name: num_layers(model.decoder) for name, model in models.items()}
    recomputed = {name: count - found.sizes.kept[name] for name, count in layers.items()}
    recomputing = (f"{recomputed[name]} of {count} layers of the {name} recomputed" for name, count in layers.items())
    print(
        f"GiB on each of {gpus} GPU(s), ZeRO-{config.zero_stage}, {config.dtype}, {found.sizes.slots} slots, "
        + ", ".join(recomputing)
    )
    print(f"{'':36}" + "".join(f"{phase:>10}" for phase in PHASES))
    for name, row in [*found.rows.items(), ("total", found.totals)]:
        print(f"{name:36}" + "".join(f"{size / GIB:10.2f}" for size in row))
    print(f"\n{'GiB of host memory':46}{'process':>10}{'node':>10}")
    for name, size in found.host.items():
        node = size * (1 if "first process only" in name else min(gpus, NODE))
        print(f"{name:46}{size / GIB:10.2f}{node / GIB:10.2f}")
    if found.vllm:
        print(f"\n--vllm_gpu_memory_utilization {found.vllm.budget / gpu_bytes(config):.3f}")
    print("\n" + verdict(config, gpus, found.totals))
    trained, frozen = {name: model.work for name, model in models.items()}, [model.work for model in rewards]
    share = sum(recomputed.values()) / sum(layers.values())
    config = with_gathering(config, gpus, gpu_bytes(config))
    moved = found.host.get(MOVED, 0)
    seconds = phases(config, gpus, trained, frozen, found.sizes.slots, share, moved)
    print("\n" + table(config, gpus, seconds, checkpoint(config, gpus, trained)))
    if attention_cap(models["policy"].decoder.config):
        print("Not counted: attention scores of eager attention, which this policy needs for its cap of them")


def verdict(config: PPOConfig, gpus: int, totals: list[int]) -> str:
    """Returns one line: whether the run fits, and if not, which single flags would reduce its memory."""
    peak, available = max(totals) / GIB, gpu_bytes(config) / GIB
    where = f"{peak:.1f} of {available:g} GiB, in {PHASES[totals.index(max(totals))]}"
    if peak <= ROOM * available:
        return f"FITS: {where}"
    changes = [{"gradient_checkpoint": True}, {"zero_stage": 3}, {"offload_optimizer": True}, {"offload_frozen": True}]
    changes += [{"lora_rank": 16}]
    if config.rollout_engine == "vllm":
        changes += [{"rollout_engine": "own"}, {"vllm_tensor_parallel_size": 2 * config.vllm_tensor_parallel_size}]
    changes += [{"gather_for_generation": "never"}]
    helps = []
    for change in changes:
        try:
            other = max(plan(replace(config, **change), gpus).totals) / GIB
        except UserError:  # it contradicts other flags, or needs a package
            continue
        if other < 0.98 * peak:
            helps += [f"--{name} {value}: {other:.1f} GiB" for name, value in change.items()]
    result = "DOES NOT FIT" if peak > available else f"TIGHT (less than {100 * (1 - ROOM):.0f} % left for CUDA)"
    return f"{result}: {where}. Each flag alone gives {'; '.join(helps) or 'no reduction: use smaller batches'}"


def table(config: PPOConfig, gpus: int, found: list[Phase], saved: Phase) -> str:
    """Returns the phases of a buffer, of which the last is the update, and a checkpoint as text."""
    seconds, floor, sent = (sum(getattr(phase, name) for phase in found) for name in ("seconds", "floor", "sent"))
    rows = [*found, Phase("buffer", seconds, floor, "", sent)]
    if config.checkpoint_per_step:
        waits = max(0.0, saved.seconds - sum(phase.seconds for phase in found[:-1]))
        rows.append(replace(saved, bound=f"{saved.bound}; the next update waits {waits:.0f} s for it"))
    outside = 1 / NODE if gpus > NODE else 0  # the share of a ring's traffic that leaves a node
    lines = [
        f"Seconds of a buffer on {config.plan_gpu} (texts of full length; rates estimated, not measured); GB that each "
        "GPU sends, and how much of it over the network",
        f"{'':14}" + "".join(f"{name:>10}" for name in ("seconds", "floor", "GB", "network")) + "   bound by",
    ]
    for phase in rows:
        numbers = f"{phase.seconds:10.2f}{phase.floor:10.2f}{phase.sent / 1e9:10.1f}{outside * phase.sent / 1e9:10.1f}"
        lines.append(f"{phase.name:14}{numbers}   {phase.bound}".rstrip())
    return "\n".join(lines)
