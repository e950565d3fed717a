"""Splits weights over the ranks by ZeRO-3 while a model is loaded, so that no rank holds the whole of it."""

from copy import copy

import deepspeed
import torch
from torch import nn

from utils.device import device
from utils.distributed import world_size
from utils.engine.settings import deepspeed_config
from utils.flags.engine import EngineConfig
from utils.models.split import Split


def splits_frozen(zero_stage: int, ranks: int) -> bool:
    """Whether the weights of frozen models are split: under ZeRO-3, and under ZeRO-1 and 2 with several ranks."""
    return zero_stage == 3 or (zero_stage > 0 and ranks > 1)


def split_settings(config: EngineConfig, offload: bool) -> dict:
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
    deepspeed.zero.Init(nn.ParameterList([first]), config_dict_or_path=split_settings(config, offload))

    def split(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(device(), dtype).contiguous()
            first.convert_to_zero_parameters(param_list=[parameter])

    return split
