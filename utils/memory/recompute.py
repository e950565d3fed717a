"""--gradient_checkpoint auto: as few layers recompute their activations in the backward pass as memory allows."""

import copy
from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from utils.distributed import world_size
from utils.engine.engine import DTYPES, TrainEngine
from utils.flags.engine import EngineConfig
from utils.memory.activation_peak import ATTENTION, peak_bytes
from utils.memory.zero_bytes import backward_bytes, moment_bytes
from utils.models.chunked_logprobs import CHUNK, logits_bytes
from utils.models.compile import layers_of
from utils.models.load import enable_checkpointing
from utils.models.padding_free import decoder_of

T = TypeVar("T")


def settle_checkpointing(
    engine: TrainEngine, model: PreTrainedModel, config: EngineConfig, tokens: int, room: int | None,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Under auto, chooses how many layers of a supervised stage's model recompute. Call it before the first forward.

    model: as for `enable_checkpointing`; tokens: of the largest forward; room: `device_room()`.
    """
    if config.gradient_checkpoint != "auto":
        return
    kept = num_layers(model)
    if room is not None:
        models = [[getattr(p, "ds_numel", p.numel()) for p in engine.parameters]]
        gradients, buckets, gathered = backward_bytes(models, config, world_size())
        room -= moment_bytes(models, config, world_size()) + gathered
        room -= gradients + buckets if config.zero_stage < 3 else 0  # ZeRO-3 has them already
        room -= logits_bytes(CHUNK * model.config.get_text_config().vocab_size, DTYPES[config.dtype].itemsize)[1]
        kept = predicted(lambda: layers_kept(on_meta(model), tokens, room), 0, say)
    recompute_fewest(model, kept, engine.name, say)


def predicted(predict: Callable[[], T], otherwise: T, say: Callable[[str], None]) -> T:
    """What `predict` returns; `otherwise` where it raises, as a failed prediction must not stop a run."""
    try:
        return predict()
    except Exception as error:  # noqa: BLE001 - depends on the family of models
        reason = str(error).partition("\n")[0]
        say(f"the memory of this model's passes is not predicted ({type(error).__name__}: {reason})")
        return otherwise


def recompute_fewest(model: PreTrainedModel, kept: int, name: str, say: Callable[[str], None]) -> None:
    """Has all layers but the last `kept` recompute their activations, where the model can, and says so."""
    layers = num_layers(model)
    kept = kept if model.supports_gradient_checkpointing else layers
    say(f"--gradient_checkpoint auto: the {name} recomputes {layers - kept} of {layers} layers")
    if kept < layers:
        enable_checkpointing(model, kept)


def num_layers(model: PreTrainedModel) -> int:
    """How many layers may recompute independently of each other; 1 where a model recomputes only as a whole."""
    return len(layers_of(model)) or 1


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder of this model again, on the meta device, as `peak_bytes` takes it."""
    decoder = decoder_of(model)
    config = copy.deepcopy(decoder.config)
    refuse_eager(config)
    config._attn_implementation = ATTENTION
    with torch.device("meta"):
        return type(decoder)(config).to(decoder.dtype)


def refuse_eager(config: PretrainedConfig) -> None:
    """Raises ValueError for eager attention: it keeps scores, which are not counted."""
    if config._attn_implementation == "eager":
        raise ValueError("eager attention")


def layers_kept(decoder: PreTrainedModel, tokens: int, room: int) -> int:
    """How many of the last layers may keep their activations of so many tokens in `room` bytes.

    decoder: on the meta device.
    """
    layers = num_layers(decoder)
    if not decoder.supports_gradient_checkpointing:
        return layers
    return max(0, bisect_right(range(layers + 1), room, key=lambda kept: training_peak(decoder, tokens, kept)) - 1)


@cache
def training_peak(decoder: PreTrainedModel, tokens: int, kept: int) -> int:
    """Bytes at most of a forward and a backward in which the last `kept` layers keep their activations."""
    decoder = copy.deepcopy(decoder).train()
    if kept < num_layers(decoder):
        enable_checkpointing(decoder, kept)
    return peak_bytes(decoder, 1, tokens, backward=True)
