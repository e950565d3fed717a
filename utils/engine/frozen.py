"""Frozen models: weights split over ranks by ZeRO-3, without optimizer state."""

from copy import copy

import deepspeed
from torch import nn

from utils.distributed import world_size
from utils.engine.memory import host_copies
from utils.engine.settings import BUCKET, deepspeed_config
from utils.flags.engine import EngineConfig
from utils.models.compile import layers_of


def splits_frozen(zero_stage: int, ranks: int) -> bool:
    """Whether the weights of frozen models are split: under ZeRO-3, and under ZeRO-1 and 2 with several ranks."""
    return zero_stage == 3 or (zero_stage > 0 and ranks > 1)


def shard_frozen(module: nn.Module, config: EngineConfig, offload: bool = False) -> nn.Module:
    """Prepares a model for scoring; if `splits_frozen`, its weights are split over the ranks.

    A split model gathers its weights layer by layer in each forward, so all ranks must call it equally often. offload:
    its shards stay in host memory.
    """
    module.requires_grad_(False).eval()
    if not splits_frozen(config.zero_stage, world_size()):
        return module
    flags = copy(config)
    flags.zero_stage, flags.offload_optimizer = 3, False
    settings = deepspeed_config(flags, offload_weights=offload)
    # It replaces torch.nn.functional.linear in the whole process, which only helps training under ZeRO-3.
    settings["zero_optimization"]["memory_efficient_linear"] = config.zero_stage == 3
    layers = layers_of(module)
    for layer in layers:  # gathered as a whole, because the experts that run depend on a rank's tokens
        deepspeed.utils.set_z3_leaf_module(layer, True)
    next_layer = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=BUCKET)
    settings["zero_optimization"]["stage3_prefetch_bucket_size"] = next_layer
    sharded, *_ = deepspeed.initialize(model=module, config=settings, dist_init_required=False)
    if offload:
        shards = [parameter.ds_tensor for parameter in module.parameters()]
        for shard, held in zip(shards, host_copies(shards), strict=True):
            shard.data = held
    return sharded
