"""Frozen models: weights split over ranks by ZeRO-3, without optimizer state."""

import deepspeed
from torch import nn

from utils.distributed import world_size
from utils.engine.memory import host_copies
from utils.engine.settings import BUCKET
from utils.engine.split import split_settings, splits_frozen
from utils.flags.engine import EngineConfig
from utils.models.compile import layers_of
from utils.models.split import whole_shape


def shard_frozen(module: nn.Module, config: EngineConfig, offload: bool = False) -> nn.Module:
    """Prepares a model for scoring; if `splits_frozen`, its weights are split over the ranks.

    A split model gathers its weights layer by layer in each forward, so all ranks must call it equally often. offload:
    its shards stay in host memory.
    """
    module.requires_grad_(False).eval()
    if not splits_frozen(config.zero_stage, world_size()):
        return module
    settings = split_settings(config, offload)
    layers = layers_of(module)
    for layer in layers:  # gathered as a whole, because the experts that run depend on a rank's tokens
        deepspeed.utils.set_z3_leaf_module(layer, True)
    next_layer = max((sum(whole_shape(p).numel() for p in layer.parameters()) for layer in layers), default=BUCKET)
    settings["zero_optimization"]["stage3_prefetch_bucket_size"] = next_layer
    sharded, *_ = deepspeed.initialize(model=module, config=settings, dist_init_required=False)
    if offload:
        shards = [parameter.ds_tensor for parameter in module.parameters()]
        for shard, held in zip(shards, host_copies(shards), strict=True):
            shard.data = held
    return sharded
