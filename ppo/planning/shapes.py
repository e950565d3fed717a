"""Shapes of the models for `--plan` and automatic sizes: models on the meta device, built from config.json alone."""

from dataclasses import dataclass
from functools import cache

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
from utils.models.padding_free import decoder_of, is_like_llama

LOGIT = 48  # bytes per logit, at most, while a token is drawn: copies and sorted indices of top-p sampling


@dataclass(frozen=True, eq=False)
class Shapes:
    """Elements of a model's parameters, its decoder on the meta device, whether it has a language-model head."""

    numels: list[int]
    decoder: nn.Module
    with_head: bool

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
        inside = sum(p.numel() for p in self.decoder.parameters()) - self.decoder.get_input_embeddings().weight.numel()
        return Work(
            numel=self.numel, body=inside, layers=text.num_hidden_layers,
            width=text.num_hidden_layers * text.num_attention_heads * size,
            head=text.hidden_size * text.vocab_size if self.with_head else 0,
            token=cache_bytes(self.decoder.config, self.decoder.dtype.itemsize),
            captured=is_like_llama(self.decoder.config) and is_capturable(self.decoder),
        )  # fmt: skip


@cache
def shapes(path: str, flag: str, dtype: torch.dtype, head: str) -> Shapes:
    """Returns the shapes of the model in a folder or hub id, of which only config.json is read. head: lm or scalar."""
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
    if head == "lm":
        return Shapes(numels, decoder_of(model), True)
    return Shapes([*numels, settings.get_text_config().hidden_size], model, False)


def models_of(config: PPOConfig) -> tuple[dict[str, Shapes], list[Shapes]]:
    """Returns ({name: model that is trained}, reward models). The reference has the policy's shapes."""
    dtype = DTYPES[config.dtype]
    policy = shapes(config.policy_model_path, "--policy_model_path", dtype, "lm")
    models = {"policy": policy}
    if config.has_critic:
        models["critic"] = shapes(config.critic_model_path, "--critic_model_path", dtype, "scalar")
    rewards = [shapes(path, config.reward_flag, dtype, "scalar") for path in config.reward_paths]
    return models, rewards


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
