"""The model that SFT trains: a causal LM that gives the loss of its answers, packed or not."""

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from data.batching.packing import restarting_positions
from sft.loss import answer_loss
from utils.models.check import SMALL, Probe, distance
from utils.models.chunked_logprobs import head_logits, nll_and_hits
from utils.models.padding_free import decoder_of, has_varlen_kernel, states_of
from utils.models.routers import recorded_router_logits, router_sums
from utils.tensors import before

SEAM = 3  # tokens behind the place where two packed dialogues meet


class AnswerModel(nn.Module):
    """A causal LM whose forward is the summed loss on answer tokens; no other logits are made."""

    def __init__(self, lm: PreTrainedModel, even_tokens: int = 0):
        """even_tokens: as in `utils.models.chunked_logprobs.sum_nll`."""
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
        decoder, config = decoder_of(self.lm), self.lm.config.get_text_config()
        with recorded_router_logits(decoder, routed is not None) as layers:
            if has_varlen_kernel(decoder) and not packed:
                hidden = states_of(decoder, sequences, before(answer_mask))
            else:
                hidden = decoder(input_ids=sequences, use_cache=False, **packed).last_hidden_state
        logits = partial(head_logits, self.lm.get_output_embeddings(), config)
        loss = nll_and_hits if with_hits else answer_loss
        sums = loss(hidden, sequences, answer_mask, logits, even_tokens=self.even_tokens)
        if routed is None:
            return sums
        return torch.cat([sums.view(-1), router_sums(layers, routed, config.num_experts_per_tok)])


def packing_failure(lm: PreTrainedModel, what: str) -> str | None:
    """Why packed dialogues would not be apart in this model, which messages call `what`; None where they are.

    State-space layers, convolutions and attention that makes its own mask let them see each other: most so the first
    tokens of a dialogue, which therefore count by themselves. Another first dialogue must not change the ones behind
    it: there nothing but a router's rounding differs, which shows what hides in bf16's rounding against the truth.
    """
    probe = Probe(lm, what)
    first, second, third = map(len, probe.rows)
    parts = [first, SEAM, second - SEAM, SEAM, third - SEAM]

    def packed(*rows: torch.Tensor) -> list[torch.Tensor]:
        ids = torch.cat(rows)[None]
        positions = restarting_positions([first, second, third], ids.shape[1])[None].to(ids.device)
        states = probe.decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        return list(probe.of_states(states).split(parts))

    def with_another_first() -> float:
        one, *others = probe.rows
        return distance(packed(one.flip(0), *others)[1:], packed(one, *others)[1:])

    failure = probe.deviation(lambda: distance(packed(*probe.rows), torch.cat(probe.true).split(parts)))
    return failure or probe.deviation(with_another_first, SMALL)
