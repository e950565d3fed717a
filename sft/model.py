"""The model that SFT trains: a causal LM whose forward pass returns the loss of the answers, packed or not."""

from functools import partial

import torch
from transformers import PreTrainedModel

from data.batching.packing import restarting_positions
from sft.loss import answer_loss
from utils.models.adapters import Adapted
from utils.models.check import SMALL, Probe, distance
from utils.models.chunked_logprobs import head_logits, nll_and_hits
from utils.models.padding_free import decoder_of, has_varlen_kernel, states_of
from utils.models.routers import recorded_router_logits, router_sums
from utils.tensors import before

BOUNDARY_TOKENS = 3  # first tokens of a packed dialogue, which are compared separately


class AnswerModel(Adapted):
    """A causal LM whose forward pass returns the summed loss of answer tokens; it computes no other logits."""

    def __init__(self, lm: PreTrainedModel, even_tokens: int = 0):
        """even_tokens: as in `utils.models.chunked_logprobs.sum_nll`."""
        super().__init__()
        self.lm = lm
        self.even_tokens = even_tokens

    def forward(
        self, sequences: torch.Tensor, answer_mask: torch.Tensor, positions: torch.Tensor | None = None,
        with_hits: bool = False, routed: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Returns the summed NLL of the masked tokens, a float32 scalar; all inputs [batch, length], right-padded.

        positions: restart at 0 for each packed dialogue. with_hits: append the number of tokens that are the most
        likely ones. routed: bool, tokens for router statistics; append their `router_sums`.
        """
        self.activate()
        # Causal attention hides right padding, and kernels are fastest without a mask. transformers masks packed
        # dialogues from restarting positions, but only if it gets no other mask.
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
    """Returns why packed dialogues would affect each other in this model, or None if they do not.

    State-space layers and attention with its own mask can mix dialogues, most visibly after a boundary. A second test
    replaces the first dialogue, which must not change the others. what: the model's name in messages.
    """
    probe = Probe(lm, what)
    first, second, third = map(len, probe.rows)
    parts = [first, BOUNDARY_TOKENS, second - BOUNDARY_TOKENS, BOUNDARY_TOKENS, third - BOUNDARY_TOKENS]

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
