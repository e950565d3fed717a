"""The pre-training (ptx) term: next-token loss on ordinary dialogues, against the alignment tax (Part I eq. 17)."""

from collections.abc import Callable, Iterator
from typing import Self

import torch

from data.batching.collate import pad
from data.batching.micro_batch_plan import rank_plan
from data.dialogues import EncodedDialogue, batches, encode_dialogues, load_dialogues
from ppo.config import PPOConfig
from ppo.loss import masked_sum
from utils.distributed import rank, world_size
from utils.engine.engine import TrainEngine, device
from utils.errors import UserError
from utils.tensors import to_device

PretrainBatch = list[EncodedDialogue]  # of one optimizer step, all ranks'
FLAG = "--ppo_pretrain_data_path"


class PretrainStream:
    """Batches without end, and the place that has been reached: all that a resumed run has to know."""

    def __init__(self, stream: Iterator[PretrainBatch]):
        self._stream = stream
        self.place = 0  # batches taken

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PretrainBatch:
        self.place += 1
        return next(self._stream)

    def go_to(self, place: int) -> None:
        """Passes over batches until `place` of them are taken; never goes back."""
        while self.place < place:
            next(self)


def load_pretrain(config: PPOConfig, tokenizer, template: str, say: Callable[[str], None]) -> PretrainStream:
    """An endless, seeded, epoch-wise stream of batches; what --maxlen_prompt cuts or drops is counted."""
    dialogues, _ = load_dialogues(config.ppo_pretrain_data_path, 0, config.seed, say, FLAG)
    encoded = encode_dialogues(tokenizer, dialogues, template, config.maxlen_prompt, say, "--maxlen_prompt")
    if not encoded:
        raise UserError(f"{FLAG} {config.ppo_pretrain_data_path}: no dialogue fits --maxlen_prompt; raise it")
    return PretrainStream(batches([encoded], config.ppo_pretrain_batch_size, config.seed))


def pretrain_loss(policy: TrainEngine, batch: PretrainBatch, weight: float, max_tokens: int) -> dict[str, torch.Tensor]:
    """Adds the gradient of weight x (mean NLL over the batch's assistant tokens). Its own mask, its own denominator."""
    lengths = [len(dialogue.ids) for dialogue in batch]
    num_tokens = sum(sum(dialogue.answer_mask) for dialogue in batch)
    total = torch.zeros((), device=device())
    for rows, counts in rank_plan(lengths, max_tokens, world_size(), rank(), policy.module.joins_rows):
        ids, _ = pad([batch[i].ids for i in rows], 0)
        mask, _ = pad([batch[i].answer_mask for i in rows], 0)
        ids, mask = (to_device(x, device()) for x in (ids, mask.bool() & bool(counts)))
        logprobs, _ = policy(ids, mask, with_entropy=False)
        loss = masked_sum(-logprobs, mask)
        policy.backward(weight * loss / num_tokens)
        total += loss.detach()
    own_tokens = torch.tensor(num_tokens / world_size(), device=device())  # added up over ranks by the caller
    return {"pretrain_loss": total, "pretrain_tokens": own_tokens}
