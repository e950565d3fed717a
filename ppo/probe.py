"""Which way of decoding samples from the distribution that scoring sees: tried before a run begins."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from ppo.grouped_attention import is_replaced
from ppo.new_token import goes_straight
from ppo.rollout import DECODING, generate
from ppo.sampling import Sampling
from ppo.types import PromptBatch
from utils.engine import InferenceEngine
from utils.errors import UserError
from utils.nll import logprobs_and_entropy
from utils.probe import Probe, worst

PROMPTS = (9, 8, 5, 3)  # tokens; more prompts than slots, of lengths that have to be padded
SLOTS, STEPS = 2, 6


def fastest_decoding(policy: nn.Module, config, what: str, say: Callable[[str], None]) -> str:
    """The first of DECODING by which the policy samples from its own distribution. It is left to decode that way.

    Raises UserError, which calls the model `what`, where none does: with a cache that is made of keys and values alone,
    as here, states of other kinds are lost from token to token. config: the run's flags. Every rank does the same.
    """
    probe = Probe(policy.lm, what)
    settings = policy.decoder.config
    applies = {"straight": goes_straight(settings), "grouped": is_replaced(settings), "own": True}
    for policy.decoding in [way for way in DECODING if applies[way]]:
        failure = probe.deviation(lambda: _distance(policy, probe, config))
        if failure is None:
            return policy.decoding
        if policy.decoding != DECODING[-1]:
            say(f"{what}: {policy.decoding} decoding is left out: with {probe.kind} it fails ({failure})")
    raise UserError(
        f"{what}: answers cannot be sampled from {probe.kind}: decoding with a key-value cache fails ({failure}). SFT "
        "and reward models work with it; for PPO give another model"
    )


def _distance(policy: nn.Module, probe: Probe, config) -> float:
    """How far log-probabilities of sampled tokens are from the model's own, in deviations of its logits; as `worst`."""
    flags = copy.copy(config)
    flags.rollout_batch_size, flags.rollout_cache_tokens, flags.maxlen_res = SLOTS, 0, STEPS
    ids = torch.cat(probe.rows).tolist()
    prompts = [ids[-length:] for length in PROMPTS]
    no_end = SimpleNamespace(eos_token_id=-1, pad_token_id=0)
    batch = PromptBatch(prompts, [[] for _ in prompts], list(range(len(prompts))))
    rollout = generate(InferenceEngine(policy), batch, Sampling(), 0, no_end, flags, measure=True)
    rows = []
    for row, real, response, sampled in zip(
        rollout.sequences, rollout.attention_mask, rollout.response_mask, rollout.old_logprobs, strict=True
    ):
        logits = probe.alone(row[real])[response[real].nonzero().squeeze(1) - 1].float()
        own, _ = logprobs_and_entropy(logits, row[response])
        rows.append((own - sampled[response]).abs() / logits.std(-1))
    return worst(rows)
