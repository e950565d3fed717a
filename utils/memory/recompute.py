"""--gradient_checkpoint auto: chooses the smallest number of layers to recompute that fits into memory."""

import copy
from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from utils.distributed import world_size
from utils.engine.engine import DTYPES, TrainEngine
from utils.engine.settings import trained_as
from utils.errors import Say
from utils.flags.engine import EngineConfig
from utils.memory.activation_peak import ATTENTION, peak_bytes
from utils.memory.zero_bytes import backward_bytes, moment_bytes
from utils.models.adapters import add_adapter
from utils.models.chunked_logprobs import CHUNK, logits_bytes
from utils.models.compile import layers_of
from utils.models.load import enable_checkpointing
from utils.models.padding_free import decoder_of

T = TypeVar("T")


def choose_checkpointing(
    engine: TrainEngine, model: PreTrainedModel, config: EngineConfig, tokens: int, room: int | None,
    say: Say,
) -> None:  # fmt: skip
    """If the flag is auto, recomputes as few layers as fit. tokens: of the largest forward; room: `device_room()`."""
    if config.gradient_checkpoint != "auto":
        return
    kept = num_layers(model)
    if room is not None:
        models = [[getattr(p, "ds_numel", p.numel()) for p in engine.parameters]]
        gradients, buckets, gathered = backward_bytes(models, trained_as(config), world_size())
        room -= moment_bytes(models, config, world_size()) + gathered
        room -= gradients + buckets if config.zero_stage < 3 else 0  # ZeRO-3 has allocated them already
        room -= logits_bytes(CHUNK * model.config.get_text_config().vocab_size, DTYPES[config.dtype].itemsize)[1]

        def predict() -> int:
            decoder = on_meta(model)
            if config.lora_rank:
                with torch.device("meta"):
                    add_adapter(decoder, "planned", config)
            return layers_kept(decoder, tokens, room)

        kept = predicted(predict, 0, say)
    recompute_fewest(model, kept, engine.name, say)


def predicted(predict: Callable[[], T], otherwise: T, say: Say) -> T:
    """Returns predict(), or `otherwise` if it raises: a failed prediction must not stop a run."""
    try:
        return predict()
    except Exception as error:  # noqa: BLE001 - depends on the architecture
        reason = str(error).partition("\n")[0]
        say(f"cannot predict the memory of this model's passes ({type(error).__name__}: {reason})")
        return otherwise


def recompute_fewest(model: PreTrainedModel, kept: int, name: str, say: Say) -> None:
    """Enables gradient checkpointing in all layers but the last `kept`, if the model supports it. Prints a line."""
    layers = num_layers(model)
    kept = kept if model.supports_gradient_checkpointing else layers
    say(f"--gradient_checkpoint auto: the {name} recomputes {layers - kept} of {layers} layers")
    if kept < layers:
        enable_checkpointing(model, kept)


def num_layers(model: PreTrainedModel) -> int:
    """Returns the number of layers that recompute independently; 1 if the model recomputes only as a whole."""
    return len(layers_of(model)) or 1


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of this model's decoder on the meta device, as `peak_bytes` requires."""
    decoder = decoder_of(model)
    config = copy.deepcopy(decoder.config)
    refuse_eager(config)
    config._attn_implementation = ATTENTION
    with torch.device("meta"):
        return type(decoder)(config).to(decoder.dtype)


def refuse_eager(config: PretrainedConfig) -> None:
    """Raises ValueError for eager attention, whose scores `peak_bytes` does not count."""
    if config._attn_implementation == "eager":
        raise ValueError("eager attention")


def layers_kept(decoder: PreTrainedModel, tokens: int, room: int) -> int:
    """Returns how many last layers of a decoder on the meta device can keep their activations in `room` bytes."""
    layers = num_layers(decoder)
    if not decoder.supports_gradient_checkpointing:
        return layers
    return max(0, bisect_right(range(layers + 1), room, key=lambda kept: training_peak(decoder, tokens, kept)) - 1)


@cache
def training_peak(decoder: PreTrainedModel, tokens: int, kept: int) -> int:
    """Returns the peak bytes of forward and backward if the last `kept` layers keep their activations."""
    decoder = copy.deepcopy(decoder).train()
    if kept < num_layers(decoder):
        enable_checkpointing(decoder, kept)
    return peak_bytes(decoder, 1, tokens, backward=True)
