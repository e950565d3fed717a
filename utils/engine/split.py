"""Splits weights over the ranks by ZeRO-3: of any model as it is loaded, and of frozen models, without an optimizer."""

from copy import copy

import deepspeed
import torch
from torch import nn

from utils.device import device
from utils.distributed import world_size
from utils.engine.memory import host_copies
from utils.engine.settings import BUCKET, deepspeed_config
from utils.flags.engine import EngineConfig
from utils.models.compile import layers_of
from utils.models.split import Split, whole_shape


def splits_frozen(zero_stage: int, ranks: int) -> bool:
    """Whether the weights of frozen models are split: under ZeRO-3, and under ZeRO-1 and 2 with several ranks."""
    return zero_stage == 3 or (zero_stage > 0 and ranks > 1)


def _settings(config: EngineConfig, offload: bool) -> dict:
    """Returns DeepSpeed's configuration of a frozen model that is split. offload: its parts stay in host memory."""
    flags = copy(config)
    flags.zero_stage, flags.offload_optimizer = 3, False
    settings = deepspeed_config(flags, offload_weights=offload)
    # It replaces torch.nn.functional.linear in the whole process, which only helps training under ZeRO-3.
    settings["zero_optimization"]["memory_efficient_linear"] = config.zero_stage == 3
    return settings


def splitter(config: EngineConfig, dtype: torch.dtype, frozen: bool = False, offload: bool = False) -> Split | None:
    """Returns the function with which a model is loaded in parts, None if each rank is to hold it whole.

    frozen: for a model that is not trained. offload: its parts stay in host memory. The function casts to `dtype`.
    """
    if not (splits_frozen(config.zero_stage, world_size()) if frozen else config.zero_stage == 3):
        return None
    # A parameter of DeepSpeed's converts others. A `zero.Init` for each tensor would parse the settings each time.
    first = nn.Parameter(torch.zeros(1, dtype=dtype, device=device()))
    deepspeed.zero.Init(nn.ParameterList([first]), config_dict_or_path=_settings(config, offload))

    def split(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(device(), dtype).contiguous()
            first.convert_to_zero_parameters(param_list=[parameter])

    return split


def shard_frozen(module: nn.Module, config: EngineConfig, offload: bool = False) -> nn.Module:
    """Prepares a model for scoring; if `splits_frozen`, its weights are split over the ranks.

    A split model gathers its weights layer by layer in each forward, so all ranks must call it equally often. offload:
    its shards stay in host memory.
    """
    module.requires_grad_(False).eval()
    if not splits_frozen(config.zero_stage, world_size()):
        return module
    settings = _settings(config, offload)
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
