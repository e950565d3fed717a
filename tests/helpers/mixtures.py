"""Tiny mixtures of experts with random weights, of the kinds that people train most."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedModel, Qwen3MoeConfig

from tests.helpers.tiny import SIZES, VOCAB, tiny_tokenizer_folder

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": Qwen3MoeConfig(**SIZES | EXPERTS | {"num_hidden_layers": 3, "mlp_only_layers": [1]}),  # one is dense
    "olmoe": OlmoeConfig(**SIZES | EXPERTS),
}


@torch.no_grad()
def tiny_mixture(kind: str = "mixtral", vocab: int = VOCAB, seed: int = 0, **changes) -> PreTrainedModel:
    """Float32, with routers that are far from even; the global random state is left alone."""
    config = type(MIXTURES[kind])(**MIXTURES[kind].to_dict() | {"vocab_size": vocab} | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config).eval()
    for weight in router_weights(lm):
        weight.mul_(20.0)
    return lm


def router_weights(lm: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Of every layer that has experts."""
    return [parameter for name, parameter in lm.named_parameters() if name.endswith(".gate.weight")]


@torch.no_grad()
def mixture_folder(folder: Path) -> Path:
    """A random Mixtral whose answers are of many lengths, with the tiny tokenizer."""
    lm = tiny_mixture(seed=1)
    lm.lm_head.weight.mul_(5.0)
    lm.lm_head.weight[lm.config.eos_token_id].mul_(3.0)
    lm.save_pretrained(folder)
    return tiny_tokenizer_folder(folder)
