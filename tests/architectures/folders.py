"""Folders of tiny models whose every number matters: nothing is left as it is initialised, and answers differ."""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.architectures.configs import HIDDEN
from tests.helpers.tiny import tiny_tokenizer_folder

NOISE = 0.2  # added to norms, biases and other vectors, which are constant at initialisation
ENTROPY = 3.0  # nats, of 6 at most


def save_folder(config: PretrainedConfig, folder: Path) -> None:
    """Writes a random causal LM of this config in float32, with the tiny tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomise(model)
    model.save_pretrained(folder)
    tiny_tokenizer_folder(folder)


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Noise on what is constant, persistent buffers included; matrices and logits of a size that tells them apart.

    The head is scaled until the next token is neither certain nor anything, which would hide errors: by the entropy,
    not the logits' deviation, as a head that is tied to the embedding all but repeats the last token.
    """
    for tensor in {id(x): x for x in model.state_dict(keep_vars=True).values() if x.is_floating_point()}.values():
        deviation = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
        if tensor.dim() >= 2 and 0 < deviation < HIDDEN**-0.5:
            tensor.mul_(HIDDEN**-0.5 / deviation)
        elif tensor.dim() < 2 or deviation == 0:
            tensor.add_(NOISE * torch.randn_like(tensor))
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (1, 40))
    head = model.get_output_embeddings().weight
    head.mul_(0.1 / model(input_ids=ids, use_cache=False).logits.std())
    entropy, before = math.log(head.shape[0]), math.inf
    while ENTROPY < entropy < before + 0.01:  # beyond a cap it grows again
        head.mul_(1.25)
        logprobs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        entropy, before = float(-(logprobs.exp() * logprobs).sum(-1).mean()), entropy
