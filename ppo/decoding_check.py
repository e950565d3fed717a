"""Which way of decoding samples from the distribution that scoring sees: tried before a run begins."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from ppo.decoding.attention import is_replaced
from ppo.decoding.llama_step import goes_ragged, goes_straight
from ppo.decoding.sampling import Sampling
from ppo.rollout import DECODING, generate
from ppo.types import PromptBatch
from utils.engine.engine import InferenceEngine
from utils.errors import UserError
from utils.models.check import FAILURES, Probe, distance

PROMPTS = (19, 16, 7, 3)  # tokens
STEPS = 8


def choose_decoding(policy: nn.Module, config, what: str, say: Callable[[str], None]) -> None:
    """Sets `policy.decoding` to the first of DECODING by which the policy samples from its own distribution.

    Raises UserError, which calls the model `what`, where none does: with a cache that is made of keys and values alone,
    as here, states of other kinds are lost from token to token. config: the run's flags. Every rank does the same.
    """
    probe = Probe(policy.lm, what)
    settings = policy.decoder.config
    straight, ragged = goes_straight(settings), goes_ragged(policy.decoder)
    applies = {"ragged": ragged, "straight": straight, "grouped": is_replaced(settings), "own": True}
    for way in filter(applies.get, DECODING):
        policy.decoding = way
        failure = probe.deviation(lambda: _distance(policy, probe, config))
        if failure is None:
            return
        if way != DECODING[-1]:
            say(f"{what}: {way} decoding is left out: with {probe.kind} it fails ({failure})")
    raise UserError(
        f"{what}: {probe.kind} cannot be decoded with a cache of keys and values ({failure}): SFT works with it, PPO "
        "does not; give another model"
    )


def _distance(policy: nn.Module, probe: Probe, config) -> float:
    """How far the logits that tokens are sampled from are from the model's own for the same tokens."""
    flags = copy.copy(config)
    flags.rollout_batch_size, flags.rollout_cache_tokens, flags.micro_batch_tokens = len(PROMPTS), 0, 1024
    flags.maxlen_res = STEPS
    ids = torch.cat(probe.rows).tolist()
    prompts = [ids[-length:] for length in PROMPTS]
    batch = PromptBatch(prompts, [[] for _ in prompts], list(range(len(prompts))))
    no_end = SimpleNamespace(eos_token_id=-1, pad_token_id=0)
    seen: list[torch.Tensor] = []  # [prompts, vocabulary] of each forward: longest prompt first, and none ends before

    def watch(logits: torch.Tensor) -> None:
        seen.append(logits.clone())

    try:
        rollout = generate(InferenceEngine(policy), batch, Sampling(), 0, no_end, flags, watch=watch)
    except (UserError, *FAILURES):
        raise
    except Exception as error:  # of Triton itself, for example without a C compiler
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    rows = [row[real] for row, real in zip(rollout.sequences, rollout.attention_mask, strict=True)]
    true = [probe.alone(row)[length - 1 : -1] for row, length in zip(rows, PROMPTS, strict=True)]
    return distance(torch.stack(seen[:STEPS], 1), true)
