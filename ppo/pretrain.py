"""The pre-training (ptx) loss: next-token loss on ordinary dialogues, against the alignment tax (Part I eq. 17)."""

from typing import Self

import torch

from data.batching.collate import pad
from data.batching.micro_batch_plan import rank_plan
from data.dialogues import DialogueEncoder, EncodedDialogue
from data.encoded import Mixture, form_options, load_encoded
from ppo.config import PPOConfig
from ppo.loss import masked_sum
from utils.distributed import rank, world_size
from utils.engine.engine import TrainEngine, device
from utils.errors import Say, UserError
from utils.sums import Sums, add
from utils.tensors import to_device

PretrainBatch = list[EncodedDialogue]  # of one optimizer step, on all ranks
FLAG = "--ppo_pretrain_data_path"


class PretrainStream:
    """An endless stream of batches in seeded order. place: batches taken so far; a resumed run sets it."""

    def __init__(self, dialogues: Mixture[EncodedDialogue], size: int):
        self._dialogues, self._size = dialogues, size
        self.place = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PretrainBatch:
        start = self.place * self._size
        self.place += 1
        return self._dialogues.take(start, self._size)


def load_pretrain(config: PPOConfig, tokenizer, template: str, say: Say) -> PretrainStream:
    """Returns an endless, seeded stream of batches; reports what --maxlen_prompt cuts or drops. Collective."""
    encoder = DialogueEncoder(tokenizer, template, config.maxlen_prompt, form_options(config), "--maxlen_prompt")
    dialogues, _ = load_encoded(config.ppo_pretrain_data_path, encoder, config, 0, config.seed, say, FLAG)
    if not len(dialogues):
        path, limit = " ".join(config.ppo_pretrain_data_path), f"--maxlen_prompt {config.maxlen_prompt}"
        raise UserError(f"{FLAG} {path}: no dialogue fits {limit}; raise it")
    return PretrainStream(dialogues, config.ppo_pretrain_batch_size)


def pretrain_loss(
    policy: TrainEngine, batch: PretrainBatch, weight: float, max_tokens: int
) -> tuple[torch.Tensor, Sums]:
    """Adds the gradient of weight * (mean NLL of assistant tokens). Returns this rank's share of (loss, sums)."""
    lengths = [len(dialogue.ids) for dialogue in batch]
    num_tokens = sum(sum(dialogue.answer_mask) for dialogue in batch)
    sums = {}
    for rows, counts in rank_plan(lengths, max_tokens, world_size(), rank(), policy.module.joins_rows):
        ids, _ = pad([batch[i].ids for i in rows], 0)
        mask, _ = pad([batch[i].answer_mask for i in rows], 0)
        ids, mask = (to_device(x, device()) for x in (ids, mask.bool() & bool(counts)))
        logprobs, _ = policy(ids, mask, with_entropy=False)
        nll = masked_sum(-logprobs, mask)
        policy.backward(weight * nll / num_tokens)
        add(sums, {"pretrain_loss": (nll.detach(), mask.sum())})
    return weight * sums["pretrain_loss"][0] / num_tokens, sums
