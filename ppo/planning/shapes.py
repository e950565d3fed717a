"""Models as `--plan` and automatic sizes see them: shapes on the meta device, of which config.json alone is read."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from ppo.config import PPOConfig
from ppo.decoding.cuda_graphs import is_capturable
from ppo.planning.step_time import Work
from utils.engine.engine import DTYPES
from utils.errors import UserError
from utils.memory.activation_peak import ATTENTION
from utils.models.padding_free import decoder_of, is_like_llama


@dataclass(frozen=True, eq=False)
class Shapes:
    """One model: elements of its parameters, its decoder on the meta device, whether it has a language-model head."""

    numels: list[int]
    decoder: nn.Module
    with_head: bool

    @property
    def numel(self) -> int:
        return sum(self.numels)

    @property
    def work(self) -> Work:
        """The sizes that predict its time."""
        text = self.decoder.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        inside = sum(p.numel() for p in self.decoder.parameters()) - self.decoder.get_input_embeddings().weight.numel()
        return Work(
            numel=self.numel,
            body=inside,
            width=text.num_hidden_layers * text.num_attention_heads * size,
            head=text.hidden_size * text.vocab_size if self.with_head else 0,
            layers=text.num_hidden_layers,
            token=cache_bytes(self.decoder.config, self.decoder.dtype.itemsize),
            captured=is_like_llama(self.decoder.config) and is_capturable(self.decoder),
        )


@cache
def shapes(path: str, flag: str, dtype: torch.dtype, head: str) -> Shapes:
    """The shapes of the model in a folder (or hub id), of which config.json alone is read. head: "lm" or "scalar"."""
    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = AutoModelForCausalLM if head == "lm" else AutoModel
        with torch.device("meta"):
            model = kind.from_config(settings, dtype=dtype, attn_implementation=ATTENTION)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: no model's config.json there ({str(error).splitlines()[0]})") from error
    numels = [p.numel() for p in model.parameters()]
    if head == "lm":
        return Shapes(numels, decoder_of(model), True)
    return Shapes([*numels, settings.get_text_config().hidden_size], model, False)


def models_of(config: PPOConfig) -> tuple[Shapes, Shapes, list[Shapes]]:
    """Policy (and reference), critic, reward models."""
    dtype = DTYPES[config.dtype]
    policy = shapes(config.policy_model_path, "--policy_model_path", dtype, "lm")
    critic = shapes(config.critic_model_path, "--critic_model_path", dtype, "scalar")
    return policy, critic, [shapes(path, config.reward_flag, dtype, "scalar") for path in config.reward_paths]


def cache_bytes(config: PretrainedConfig, element: int) -> int:
    """Keys and values of one token in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * element
