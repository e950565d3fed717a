"""The pre-training (ptx) term: next-token loss on ordinary dialogues, against the alignment tax (Part I eq. 17)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from data.collate import pad
from data.dialogues import load_dialogues
from data.order import order
from data.shares import rank_plan
from data.template import encode_dialogue
from ppo.config import PPOConfig
from ppo.loss import masked_sum
from utils.distributed import rank, world_size
from utils.engine import TrainEngine, device
from utils.errors import UserError


@dataclass(frozen=True)
class PretrainBatch:
    """Dialogues of one optimizer step, all ranks': ids, and which of them are the assistant's."""

    ids: list[list[int]]
    token_masks: list[list[bool]]


def load_pretrain(config: PPOConfig, tokenizer, template: str, say: Callable[[str], None]) -> Iterator[PretrainBatch]:
    """An endless, seeded, epoch-wise stream of batches; dialogues longer than --maxlen_prompt are left out, counted."""
    dialogues, _ = load_dialogues(config.ppo_pretrain_data_path, 0, config.seed, say)
    encoded = [encode_dialogue(tokenizer, dialogue.turns, template) for dialogue in dialogues]
    fitting = [item for item in encoded if len(item[0]) <= config.maxlen_prompt]
    if len(fitting) < len(encoded):
        say(f"pre-training: {len(encoded) - len(fitting)} dialogues left out, longer than --maxlen_prompt")
    if not fitting:
        raise UserError(f"--ppo_pretrain_data_path {config.ppo_pretrain_data_path}: no dialogue fits --maxlen_prompt")
    return _batches(fitting, config.ppo_pretrain_batch_size, config.seed)


def _batches(encoded: list[tuple[list[int], list[bool]]], size: int, seed: int) -> Iterator[PretrainBatch]:
    start = 0
    while True:
        chosen = [encoded[i] for i in order(start, size, len(encoded), seed)]
        start += size
        yield PretrainBatch([ids for ids, _ in chosen], [mask for _, mask in chosen])


def pretrain_loss(policy: TrainEngine, batch: PretrainBatch, weight: float, max_tokens: int) -> dict[str, torch.Tensor]:
    """Adds the gradient of weight x (mean NLL over the batch's assistant tokens). Its own mask, its own denominator."""
    lengths = [len(ids) for ids in batch.ids]
    num_tokens = sum(sum(mask) for mask in batch.token_masks)
    total = torch.zeros((), device=device())
    for rows, counts in rank_plan(lengths, max_tokens, world_size(), rank()):
        ids, _ = pad([batch.ids[i] for i in rows], 0)
        mask, _ = pad([batch.token_masks[i] for i in rows], 0)
        mask = (mask.bool() & bool(counts)).to(device())
        logprobs, _ = policy(ids.to(device()), mask)
        loss = masked_sum(-logprobs, mask)
        policy.backward(weight * loss / num_tokens)
        total += loss.detach()
    own_tokens = torch.tensor(num_tokens / world_size(), device=device())  # added up over ranks by the caller
    return {"pretrain_loss": total, "pretrain_tokens": own_tokens}
