"""The truth: transformers' own forwards of one sequence at a time. No padding, no mask, no cache, eager attention.

Eager, as transformers' other kernels leave parts out (the attention softcap), and this toolkit registers some.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel


def load_plain(folder: Path, auto_class: type = AutoModelForCausalLM) -> PreTrainedModel:
    """The folder's model in float32, as transformers alone loads it."""
    config = AutoConfig.from_pretrained(folder)
    other = config.model_type == "falcon" and config.alibi  # its eager attention scales ALiBi in another way than sdpa
    kernel = "sdpa" if other else "eager"
    return auto_class.from_pretrained(folder, dtype=torch.float32, attn_implementation=kernel).eval()


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[length] -> [length, vocabulary]."""
    return model(input_ids=ids[None], use_cache=False).logits[0].float()


def logprobs_of(model: PreTrainedModel, ids: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, ...]:
    """(log p, entropy before it) of each id but the first: [length - 1] each."""
    every = (logits_of(model, ids)[:-1] / temperature).log_softmax(-1)
    return every.gather(-1, ids[1:, None])[:, 0], -(every.exp() * every).sum(-1)


def states_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The last hidden states of the model below the head: [length, hidden]."""
    return model(input_ids=ids[None], use_cache=False).last_hidden_state[0].float()


def score_of(folder: Path, rows: list[torch.Tensor]) -> torch.Tensor:
    """What transformers' classifier in the folder says of each row: [rows]."""
    model = load_plain(folder, AutoModelForSequenceClassification)
    return torch.stack([model(input_ids=ids[None], use_cache=False).logits[0, 0].float() for ids in rows])
