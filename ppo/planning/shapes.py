"""Shapes of the models for `--plan` and automatic sizes: models on the meta device, built from config.json alone."""

import copy
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from ppo.config import PPOConfig
from ppo.decoding.cuda_graphs import is_capturable
from ppo.decoding.kv_cache import columns_for
from ppo.planning.step_time import Work
from utils.engine.engine import DTYPES
from utils.errors import UserError
from utils.memory.activation_peak import ATTENTION
from utils.models.adapter_folder import chain
from utils.models.adapters import add_adapter
from utils.models.padding_free import decoder_of, is_like_llama

_ADAPTED: dict[tuple, "Shapes"] = {}
LOGIT = 48  # bytes per logit, at most, while a token is drawn: copies and sorted indices of top-p sampling


@dataclass(frozen=True, eq=False)
class Shapes:
    """Elements of a model's parameters, its decoder on the meta device, whether it has a language-model head.

    base: the folder of its weights. adapters: elements of what is trained instead, in float32 (--lora_rank).
    """

    numels: list[int]
    decoder: nn.Module
    with_head: bool
    base: str = ""
    adapters: tuple[int, ...] = ()

    @property
    def trained(self) -> list[int]:
        """Elements of the parameters that are trained."""
        return [*self.adapters] or self.numels

    @property
    def numel(self) -> int:
        return sum(self.numels)

    @property
    def text(self) -> PretrainedConfig:
        """The config of its decoder."""
        return self.decoder.config.get_text_config()

    @property
    def work(self) -> Work:
        """The sizes that its time depends on."""
        text = self.text
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        frozen = sum(p.numel() for name, p in self.decoder.named_parameters() if "lora_" not in name)
        inside = frozen - self.decoder.get_input_embeddings().weight.numel()
        return Work(
            numel=self.numel, trained=sum(self.trained), body=inside, layers=text.num_hidden_layers,
            width=text.num_hidden_layers * text.num_attention_heads * size,
            head=text.hidden_size * text.vocab_size if self.with_head else 0,
            token=cache_bytes(self.decoder.config, self.decoder.dtype.itemsize),
            captured=is_like_llama(self.decoder.config) and is_capturable(self.decoder),
        )  # fmt: skip


@cache
def shapes(path: str, flag: str, dtype: torch.dtype, head: str) -> Shapes:
    """Returns the shapes of the model in a folder or hub id, of which only config.json is read. head: lm or scalar."""
    path = chain(path, flag, lambda name, _: Path(name))[0][0]
    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = AutoModelForCausalLM if head == "lm" else AutoModel
        with torch.device("meta"):
            model = kind.from_config(settings, dtype=dtype, attn_implementation=ATTENTION)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{flag} {path}: no model's config.json there, the only file of a model that --plan needs ({reason})"
        ) from error
    numels = [p.numel() for p in model.parameters()]
    base = os.path.realpath(path)
    if head == "lm":
        return Shapes(numels, decoder_of(model), True, base)
    return Shapes([*numels, settings.get_text_config().hidden_size], model, False, base)


def with_adapter(model: Shapes, config: PPOConfig, rank: int = 0) -> Shapes:
    """Returns the shapes of a model with an adapter of this rank; 0: --lora_rank."""
    if not config.lora_rank:
        return model
    decoder = copy.deepcopy(model.decoder)
    with torch.device("meta"):
        add_adapter(decoder, "planned", config, rank)
    trained = [p.numel() for p in decoder.parameters() if p.requires_grad]
    head = [] if model.with_head else [model.text.hidden_size]
    return replace(model, decoder=decoder, adapters=(*trained, *head))


def models_of(config: PPOConfig) -> tuple[dict[str, Shapes], list[Shapes]]:
    """Returns ({name: model that is trained}, reward models). The reference has the policy's shapes."""
    dtype = DTYPES[config.dtype]
    models = {"policy": _adapted(config, config.policy_model_path, "--policy_model_path", dtype, "lm", 0)}
    if config.has_critic:
        rank = config.critic_lora_rank
        models["critic"] = _adapted(config, config.critic_model_path, "--critic_model_path", dtype, "scalar", rank)
    rewards = [shapes(path, config.reward_flag, dtype, "scalar") for path in config.reward_paths]
    return models, rewards


def _adapted(config: PPOConfig, path: str, flag: str, dtype: torch.dtype, head: str, rank: int) -> Shapes:
    """Returns `with_adapter(shapes(…))`, the same object for the same flags: `peak_bytes` is cached by its decoder."""
    flags = (config.lora_rank, *config.lora_target_modules, config.use_dora)
    key = (path, dtype, head, rank, *flags)
    if key not in _ADAPTED:
        _ADAPTED[key] = with_adapter(shapes(path, flag, dtype, head), config, rank)
    return _ADAPTED[key]


def sharing(config: PPOConfig, models: dict[str, Shapes], rewards: list[Shapes]) -> tuple[dict[str, bool], list[bool]]:
    """Returns which trained models, and which of the reference and reward models, use an earlier model's weights."""
    seen = set()

    def is_shared(model: Shapes) -> bool:
        known = bool(config.lora_rank) and config.share_base == "auto" and model.base in seen
        seen.add(model.base)
        return known

    trained = {name: is_shared(model) for name, model in models.items()}
    return trained, [bool(config.lora_rank), *map(is_shared, rewards)]


def cache_bytes(config: PretrainedConfig, element: int, gpus: int = 1) -> int:
    """Returns the bytes of one token's keys and values in all layers, on each of `gpus` that share the heads."""
    text = config.get_text_config()
    heads = -(-(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) // gpus)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * element


def slot_bytes(config: PPOConfig, model: PretrainedConfig) -> int:
    """Returns the bytes of one slot: keys and values, a copy of those of one layer, logits and random numbers."""
    text, element = model.get_text_config(), DTYPES[config.dtype].itemsize
    layers = text.num_hidden_layers
    cache = cache_bytes(model, element) * columns_for(config.maxlen_prompt) * (layers + 1) // layers
    return cache + LOGIT * text.vocab_size + 8 * config.maxlen_res


def tokens_of(config: PPOConfig) -> int:
    """Returns the tokens of the largest forward."""
    return max(config.micro_batch_tokens, config.maxlen_prompt)
