"""The DeepSpeed configuration that follows from the flags."""

import copy

from utils.device import on_gpu
from utils.distributed import world_size
from utils.flags.engine import EngineConfig

PERSISTENT = 10_000  # elements: ZeRO-3 keeps smaller parameters (norms, biases) whole on every rank
BUCKET = 50_000_000  # elements of a gradient bucket on a GPU (100 MB in bf16); a tenth of that on a CPU


def deepspeed_config(config: EngineConfig, offload_weights: bool = False) -> dict:
    """Returns DeepSpeed's JSON configuration.

    `managed_gradient_accumulation` is off: the caller decides how many micro-batches belong to a step.
    offload_weights: keep each rank's share of the weights in host memory (ZeRO-3).
    """
    bucket = BUCKET if on_gpu() else BUCKET // 10
    zero = {"stage": config.zero_stage, "contiguous_gradients": True, "reduce_bucket_size": bucket}
    if adds_up_in_place(config):
        # Without the hooks of stage 2, gradients accumulate in parameter.grad rather than in copies.
        zero |= {"stage": 1, "contiguous_gradients": False}
    zero["overlap_comm"] = zero["stage"] >= 2 and on_gpu()
    if config.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": PERSISTENT}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu()}
    if offload_weights:
        zero["offload_param"] = {"device": "cpu"}  # `shard_frozen` page-locks it in less memory than DeepSpeed does
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.gradient_clip if config.zero_stage else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": config.dtype == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32" if config.adds_up_in_float32 else config.dtype},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it synchronises with the GPU in every forward and step
    }


def trained_as(config: EngineConfig) -> EngineConfig:
    """Returns the flags as DeepSpeed needs them: adapters are float32, whatever --dtype is."""
    if not config.lora_rank:
        return config
    config = copy.copy(config)
    config.dtype = "fp32"
    return config


def adds_up_in_place(config: EngineConfig) -> bool:
    """Whether ZeRO-1 or 2 accumulates gradients in `parameter.grad`: one rank, no offload, no float32 copy."""
    alone = config.zero_stage in (1, 2) and world_size() == 1
    return alone and not (config.offload_optimizer or config.adds_up_in_float32)
