"""Mixture-of-experts routers: load-balancing loss and load metrics.

transformers' decoders record the logits with `output_router_logits=True`, for all architectures alike.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from utils.errors import Say, UserError
from utils.models.padding_free import decoder_of
from utils.models.split import gathered

ASK = {"output_router_logits": True}
ROUTER_METRICS = ("router_aux_loss", "router_max_load", "router_entropy")


def router_coef(lm: PreTrainedModel, asked: float | None, what: str, say: Say = print) -> float:
    """Returns the weight of the load-balancing loss: `asked`, or the config's if None; 0 for a model without routers.

    what: flag and path of the model. Raises UserError if a weight is asked for and the decoder records no router
    logits.
    """
    config = lm.config.get_text_config()
    coef = (getattr(config, "router_aux_loss_coef", None) or 0.0) if asked is None else asked
    if not coef:
        return 0.0
    if getattr(config, "num_experts_per_tok", None) and _gives_router_logits(decoder_of(lm)):
        say(f"{what}: load-balancing loss of its routers with weight {coef:g} (--router_aux_loss_coef)")
        return coef
    if asked is None:
        return 0.0
    raise UserError(
        f"--router_aux_loss_coef {asked:g}: {what}, a {type(lm).__name__}, records no router logits, or has no "
        "num_experts_per_tok in its config; leave the flag out"
    )


@torch.no_grad()
def _gives_router_logits(decoder: nn.Module) -> bool:
    """Whether a forward records router logits, one row per token."""
    if "router_logits" not in getattr(decoder, "can_record_outputs", {}):
        return False
    ids = torch.tensor([[1, 2, 3]], device=next(decoder.parameters()).device)
    with gathered(decoder), recorded_router_logits(decoder) as layers:
        decoder(input_ids=ids, use_cache=False)
    return bool(layers) and all(x.shape[:-1].numel() == ids.numel() for x in layers)


@contextlib.contextmanager
def recorded_router_logits(decoder: nn.Module, wanted: bool = True) -> Iterator[list[torch.Tensor]]:
    """Context in which, if wanted, forwards append the router logits [..., experts] of each layer to the list."""
    layers: list[torch.Tensor] = []
    if not wanted:
        yield layers
        return
    handles = [
        decoder.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | ASK), with_kwargs=True),
        decoder.register_forward_hook(lambda _, args, output: layers.extend(output.router_logits)),
    ]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def router_sums(layers: Sequence[torch.Tensor], counted: torch.Tensor, top_k: int) -> torch.Tensor:
    """Returns ROUTER_METRICS of one forward, each times the number of counted tokens: float32 [3], loss differentiable.

    layers: router logits, one row per position; counted: bool per position, False at padding. Loss: Switch Transformer
    (arXiv 2101.03961), eq. 4 to 6 without α, for top_k choices and pooled layers; top_k if balanced. Load: largest
    share of one expert in a layer's choices times number of experts; 1 if balanced. Entropy: nats per token.
    """
    places = counted.flatten().nonzero().squeeze(-1)
    num_tokens = max(1, len(places))
    loads, probabilities, entropies = [], [], []
    for logits in layers:
        probability = logits.flatten(0, -2)[places].float().softmax(-1)
        chosen = torch.zeros_like(probability).scatter(1, probability.topk(top_k).indices, 1.0)
        loads.append(chosen.sum(0) / num_tokens)
        probabilities.append(probability.sum(0) / num_tokens)
        entropies.append(torch.special.entr(probability.detach()).sum() / num_tokens)
    load, probability = torch.stack(loads), torch.stack(probabilities)  # [layers, experts] each
    experts = load.shape[-1]
    loss = experts * (load.mean(0) * probability.mean(0)).sum()
    largest = experts / top_k * load.amax(-1).mean()
    return len(places) * torch.stack([loss, largest, torch.stack(entropies).mean()])
