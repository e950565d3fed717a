"""Random LLaMAs and prompts with fixed seeds. Imports only torch and transformers, because TRL's side uses it too."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

Sizes = dict[str, int]  # fields of a LlamaConfig


def _sizes(hidden: int, layers: int, heads: int, intermediate: int, **others: int) -> Sizes:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (hidden, layers, heads, intermediate), strict=True)) | others


MODELS = {
    "tiny": _sizes(64, 2, 4, 128, num_key_value_heads=2),
    "58M": _sizes(512, 8, 8, 1376),
    "1.1B": _sizes(2048, 22, 32, 5632, num_key_value_heads=4),  # TinyLlama
    "7B": _sizes(4096, 32, 32, 11008),  # LLaMA
    "8B": _sizes(4096, 32, 32, 14336, num_key_value_heads=8, vocab_size=128256),  # Llama 3
}
SIZES = MODELS["58M"]


def config_of(sizes: Sizes) -> LlamaConfig:
    """Returns a LLaMA config; the defaults are 32,000 tokens and 2,048 positions.

    initializer_range is 0.02 at hidden size 4,096 and scaled such that attention is not uniform at other sizes.
    """
    usual = {"vocab_size": 32000, "max_position_embeddings": 2048, "num_labels": 1}
    return LlamaConfig(initializer_range=1.28 / sizes["hidden_size"] ** 0.5, **usual | sizes)


def random_lm(sizes: Sizes, dtype: torch.dtype, device: torch.device, attention: str | None = None) -> PreTrainedModel:
    """Returns a random causal LM. attention: attention implementation; None: transformers' choice."""
    return _random(AutoModelForCausalLM, sizes, dtype, device, attention)


def random_classifier(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Returns the same decoder as a classifier with one label; token 0 is padding."""
    return _random(AutoModelForSequenceClassification, sizes | {"pad_token_id": 0}, dtype, device, None)


def _random(kind, sizes: Sizes, dtype: torch.dtype, device: torch.device, attention: str | None) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return kind.from_config(config_of(sizes), dtype=dtype, attn_implementation=attention)


def random_prompts(count: int) -> list[list[int]]:
    """Returns ids of prompts with 32 to 448 tokens, log-uniform."""
    generator = torch.Generator().manual_seed(0)
    lengths = (32 * (448 / 32) ** torch.rand(count, generator=generator)).int().tolist()
    return random_ids(lengths, generator)


def random_ids(lengths: list[int], generator: torch.Generator, vocabulary: int = 32000) -> list[list[int]]:
    """Returns random sequences of these lengths, without the first three tokens, which are special."""
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
