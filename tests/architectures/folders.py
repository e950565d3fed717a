"""Folders of tiny models whose every number matters: nothing is left as it is initialised, and answers differ."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.architectures.configs import HIDDEN
from tests.tiny import tiny_tokenizer_folder

NOISE = 0.2  # added to norms, biases and other vectors, which are constant at initialisation
SPREAD = 3.0  # deviation of the logits, before a cap


def save_folder(config: PretrainedConfig, folder: Path, seed: int = 0) -> None:
    """Writes a random causal LM of this config in float32, with the tiny tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model)
    model.save_pretrained(folder)
    tiny_tokenizer_folder(folder)


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Noise on what is constant, persistent buffers included; matrices and logits of a size that tells them apart."""
    persistent = model.state_dict(keep_vars=True)
    for tensor in {id(x): x for x in persistent.values()}.values():
        if not tensor.is_floating_point():
            continue
        deviation = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
        if tensor.dim() >= 2 and 0 < deviation < HIDDEN**-0.5:
            tensor.mul_(HIDDEN**-0.5 / deviation)
        elif tensor.dim() < 2 or deviation == 0:
            tensor.add_(NOISE * torch.randn_like(tensor))
    ids = torch.arange(3, 43)[None]
    head: nn.Module = model.get_output_embeddings()
    for _ in range(2):  # twice, as tied embeddings and caps answer to it less than in proportion
        spread = float(model(input_ids=ids, use_cache=False).logits.std())
        head.weight.mul_(min(10.0, SPREAD / spread))
