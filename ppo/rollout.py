"""Prompts in, sampled responses out."""

from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from data.collate import pad
from ppo.config import PPOConfig
from ppo.sampling import Sampling, sample, uniforms
from ppo.types import PromptBatch, Rollout
from utils.distributed import any_rank
from utils.engine import TrainEngine, device
from utils.tensors import position_ids


@torch.no_grad()
def generate(
    policy: TrainEngine, prompts: PromptBatch, sampling: Sampling, seed: int, tokenizer, config: PPOConfig
) -> Rollout:
    """Samples one response a prompt, rollout_batch_size at once, longest prompts together.

    Under ZeRO-3 the weights are gathered once when they fit (--gather_for_generation); else all ranks step
    together until the last response of all is done, so every rank must bring the same number of prompts. Time grows
    with the longest response of each batch; memory with rollout_batch_size x (prompt + response) of key-value cache.
    """
    policy.module.eval()
    place, gather, batch_size = device(), config.gather_for_generation, config.rollout_batch_size
    together = policy.zero_stage == 3 and (gather == "never" or (gather == "auto" and not policy.fits_gathered()))
    by_length = sorted(range(len(prompts.ids)), key=lambda i: len(prompts.ids[i]), reverse=True)
    responses: list[torch.Tensor] = [None] * len(by_length)

    def run(decode: Callable) -> None:
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            ids = [prompts.ids[i] for i in chosen]
            places = torch.tensor([prompts.places[i] for i in chosen], device=place)
            tokens = _decode(decode, ids, places, sampling, seed, config.maxlen_res, tokenizer, together)
            for i, row in zip(chosen, tokens, strict=True):
                responses[i] = row

    if together:
        run(policy)
    else:
        with policy.gathered() as module:
            run(module)
    return assemble(prompts.ids, responses, tokenizer.eos_token_id, tokenizer.pad_token_id)


def _decode(
    decode: Callable, prompts: list[list[int]], places: torch.Tensor, sampling: Sampling, seed: int, maxlen_res: int,
    tokenizer, together: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """One batch over a key-value cache: left-padded prompts, then a token a step. Returns responses, EOS included."""
    device = places.device
    ids, prompt_mask = (x.to(device) for x in pad(prompts, tokenizer.pad_token_id, side="left"))
    batch, width = ids.shape
    mask = torch.cat([prompt_mask, torch.ones(batch, maxlen_res, dtype=torch.bool, device=device)], dim=1)
    positions = position_ids(mask)
    tokens = torch.empty(batch, maxlen_res, dtype=torch.int64, device=device)
    lengths = torch.full((batch,), maxlen_res, device=device)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    cache, inputs, seen = DynamicCache(), ids, None
    for t in range(maxlen_res):
        start, end = (0, width) if t == 0 else (width + t - 1, width + t)
        logits = decode(
            decode={
                "input_ids": inputs, "attention_mask": mask[:, :end], "position_ids": positions[:, start:end],
                "past_key_values": cache, "use_cache": True, "logits_to_keep": 1,
            }
        )  # fmt: skip
        if sampling.repetition_penalty != 1.0 and seen is None:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            rows, columns = prompt_mask.nonzero(as_tuple=True)
            seen[rows, ids[rows, columns]] = True
        token = sample(logits, uniforms(seed, places, t), sampling, seen)
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        tokens[:, t] = token
        ends_now = (token == tokenizer.eos_token_id) & ~finished
        lengths = torch.where(ends_now, t + 1, lengths)
        finished |= ends_now
        going = not bool(finished.all())
        if not (any_rank(going, device) if together else going):
            break
        inputs = token[:, None]
    return [row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)]


def assemble(prompts: list[list[int]], responses: list[torch.Tensor], eos_id: int, pad_id: int) -> Rollout:
    """Prompts and responses side by side, right-padded, with masks from their lengths. An empty response is fine."""
    device = responses[0].device
    rows = [
        torch.cat([torch.tensor(prompt, dtype=torch.int64, device=device), response])
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    sequences = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    places = torch.arange(sequences.shape[1], device=device)
    attention_mask = places < lengths[:, None]
    response_mask = attention_mask & (places >= starts[:, None])
    ended = (sequences.gather(1, (lengths - 1)[:, None]).squeeze(1) == eos_id) & (lengths > starts)
    return Rollout(sequences, attention_mask, response_mask, ended)


def response_ids(rollout: Rollout) -> list[list[int]]:
    """The response tokens of each row, EOS included."""
    return [row[mask].tolist() for row, mask in zip(rollout.sequences, rollout.response_mask, strict=True)]
