"""The model that SFT trains: a causal LM that gives the loss of its answers, packed or not."""

import inspect
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from sft.loss import answer_loss
from utils.errors import UserError
from utils.nll import head_logits, nll_and_hits
from utils.routers import recorded_router_logits, router_sums


class AnswerModel(nn.Module):
    """A causal LM whose forward is the summed loss on answer tokens; no other logits are made."""

    def __init__(self, lm: PreTrainedModel, even_tokens: int = 0):
        """even_tokens: as in `utils.nll.sum_nll`."""
        super().__init__()
        self.lm = lm
        self.even_tokens = even_tokens

    def forward(
        self,
        sequences: torch.Tensor,
        answer_mask: torch.Tensor,
        positions: torch.Tensor | None = None,
        with_hits: bool = False,
        routed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Summed NLL of the masked tokens, float32 scalar; with hits [2], the second how many were the likeliest.

        All inputs [batch, length], right-padded; positions: 0 where a packed dialogue begins. routed: bool, the tokens
        that router statistics count; then `router_sums` of them stand behind, in one vector.
        """
        # Right padding needs no attention mask: causality hides it, and attention kernels are fastest so. Between
        # packed dialogues transformers makes one from positions that start anew, but only when it is given no other.
        packed = {} if positions is None else {"position_ids": positions}
        decoder, config = self.lm.get_decoder(), self.lm.config.get_text_config()
        with recorded_router_logits(decoder, routed is not None) as layers:
            hidden = decoder(input_ids=sequences, use_cache=False, **packed).last_hidden_state
        logits = partial(head_logits, self.lm.get_output_embeddings(), config)
        loss = nll_and_hits if with_hits else answer_loss
        sums = loss(hidden, sequences, answer_mask, logits, even_tokens=self.even_tokens)
        if routed is None:
            return sums
        return torch.cat([sums.view(-1), router_sums(layers, routed, config.num_experts_per_tok)])


@torch.no_grad()
def check_packing(lm: PreTrainedModel) -> None:
    """Raises UserError when this model's packed dialogues would see each other.

    Two rows differ in their first dialogue only; the states of the second must not. State-space layers, convolutions
    and attention that builds its own mask fail it. To 2 %, for the sake of experts that batch tokens by their route.
    """
    decoder = lm.get_decoder()
    apart = "position_ids" in inspect.signature(decoder.forward).parameters
    if apart:
        place = next(lm.parameters()).device
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=place)
        one, other = (
            decoder(
                input_ids=torch.tensor([[*first, 1, 3, 4, 2]], device=place), position_ids=positions, use_cache=False
            ).last_hidden_state[:, 4:].float()
            for first in ([1, 3, 4, 5], [5, 6, 1, 2])
        )  # fmt: skip
        apart = bool((one - other).norm() < 0.02 * one.norm())
    if not apart:
        raise UserError(
            f"--packing True: {type(lm).__name__} would let packed dialogues see each other; give --packing False"
        )
