"""Prompts in, sampled responses out."""

import contextlib
from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pad_sequence

from ppo.config import PPOConfig
from ppo.decoding.attention import alone_from, grouped
from ppo.decoding.cuda_graphs import is_capturable
from ppo.decoding.kv_cache import AUTO_SLOTS
from ppo.decoding.llama_step import goes_ragged, goes_straight
from ppo.decoding.sampling import Sampling
from ppo.decoding.scheduler import Room, decode_all, decode_measured
from ppo.types import MeasuredRollout, PromptBatch, Rollout
from utils.engine.engine import TrainEngine, device
from utils.models.compile import eager
from utils.tensors import at_tokens, to_device
from utils.tokenizer import stop_ids

# Ways to decode new tokens, the fastest first (modules in ppo/decoding/). ragged: as straight, with the kernels of
# ragged_attention.py and CUDA graphs, on a GPU. straight: through the layers by llama_step.py (LLaMA's kind; other
# models and split weights fall back to grouped). grouped: the model's forward with the attention of attention.py. own:
# the model's forward, unchanged.
DECODING = ("ragged", "straight", "grouped", "own")


@torch.no_grad()
def generate(
    policy: TrainEngine, prompts: PromptBatch, sampling: Sampling, seed: int, tokenizer, config: PPOConfig,
    measure: bool = False, watch: Callable | None = None,
) -> Rollout:  # fmt: skip
    """Samples one response a prompt, rollout_batch_size at once; where one ends, the next prompt begins.

    Under ZeRO-3 the weights are gathered once when they fit (--gather_for_generation); else all ranks step
    together until the last response of all is done. Time grows with the tokens of all responses together; memory with
    the key-value cache: rollout_batch_size x 9/8 (longest prompt + maxlen_res) tokens, or --rollout_cache_tokens.
    measure: a `MeasuredRollout`, so that `score` need not ask the policy again. watch: as in `decode_all`.
    """
    policy.module.eval()
    together = policy.zero_stage == 3 and (
        config.gather_for_generation == "never"
        or (config.gather_for_generation == "auto" and not policy.fits_gathered())
    )
    limits, place = [config.maxlen_res] * len(prompts.ids), device()
    decoding = policy.module.decoding
    room = room_of(config, policy.module.decoder, place, together, decoding, policy.module.slots)
    attention = contextlib.nullcontext() if decoding == "own" else grouped(policy.module.lm.config)
    weights = contextlib.nullcontext(policy) if together else policy.gathered()
    with weights as decode, attention, eager(policy.module):
        work = (decode, prompts.ids, prompts.places, limits, sampling, seed, tokenizer, room, place)
        if measure:
            responses, *measured = decode_measured(*work, together=together)
        else:
            responses = decode_all(*work, together, watch)
    rollout = assemble(prompts.ids, responses, stop_ids(tokenizer), tokenizer.pad_token_id)
    return with_measured(rollout, *measured) if measure else rollout


def room_of(
    config: PPOConfig, decoder: torch.nn.Module, place: torch.device, split: bool = False, decoding: str = DECODING[0],
    slots: int = AUTO_SLOTS,
) -> Room:  # fmt: skip
    """The `Room` that the flags give. On a GPU, decoding asks only every few tokens which responses have ended.

    split: the weights stay split (ZeRO-3), and all ranks have to call the same modules. decoding: of DECODING.
    slots: how many under --rollout_batch_size auto.
    """
    looks = 4 if place.type == "cuda" else 1
    straight = decoding in ("ragged", "straight") and not split and goes_straight(decoder.config)
    ragged = decoding == "ragged" and straight and goes_ragged(decoder)
    alone = None if decoding == "own" else alone_from(decoder)
    tokens, cache_tokens = config.micro_batch_tokens, config.rollout_cache_tokens
    slots = slots if config.rollout_batch_size == "auto" else config.rollout_batch_size
    graphs = ragged and is_capturable(decoder)
    return Room(slots, tokens, cache_tokens, alone, looks, straight, ragged, graphs)


def assemble(
    prompts: list[list[int]], responses: list[torch.Tensor], stops: int | tuple[int, ...], pad_id: int
) -> Rollout:
    """Prompts and responses side by side, right-padded, with masks from their lengths. An empty response is fine.

    stops: the id, or ids, that end a response.
    """
    device = responses[0].device
    sizes = [len(prompt) for prompt in prompts]
    together = to_device(torch.tensor([i for prompt in prompts for i in prompt], dtype=torch.int64), device)
    rows = [torch.cat(pair) for pair in zip(together.split(sizes), responses, strict=True)]
    starts, lengths = (to_device(torch.tensor(x), device) for x in (sizes, [len(row) for row in rows]))
    sequences = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    places = torch.arange(sequences.shape[1], device=device)
    attention_mask = places < lengths[:, None]
    response_mask = attention_mask & (places >= starts[:, None])
    last = sequences.gather(1, (lengths - 1)[:, None])
    ended = (last == to_device(torch.tensor(stops), device)).any(1) & (lengths > starts)
    return Rollout(sequences, attention_mask, response_mask, ended)


def with_measured(rollout: Rollout, logprobs: list[torch.Tensor], entropy: list[torch.Tensor]) -> MeasuredRollout:
    """The rollout with these numbers of each response's tokens."""
    columns = (at_tokens(torch.cat(x), rollout.response_mask) for x in (logprobs, entropy))
    return MeasuredRollout(**vars(rollout), **dict(zip(("old_logprobs", "entropy"), columns, strict=True)))


def response_ids(rollout: Rollout) -> list[list[int]]:
    """The response tokens of each row, the end token included."""
    sequences, masks = rollout.sequences.cpu(), rollout.response_mask.cpu()
    return [row[mask].tolist() for row, mask in zip(sequences, masks, strict=True)]
