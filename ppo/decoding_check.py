"""Chooses how a policy decodes: the fastest way that samples from the distribution that scoring computes."""

import copy
from types import SimpleNamespace

import torch
from torch import nn

from ppo.decoding.attention import can_group
from ppo.decoding.llama_step import can_run_llama_step, can_run_triton
from ppo.decoding.sampling import Sampling
from ppo.rollout import DECODING, PolicySampler
from ppo.types import PromptBatch
from utils.engine.engine import InferenceEngine
from utils.errors import Say, UserError
from utils.models.check import FAILURES, Probe, distance

PROMPTS = (19, 16, 7, 3)  # tokens
STEPS = 8


def choose_decoding(policy: nn.Module, config, what: str, say: Say, layered: bool = False) -> None:
    """Sets `policy.decoding` to the first of DECODING by which the policy samples from its own distribution.

    The same on all ranks. Raises UserError, which calls the model `what`, if none does: the cache holds keys and values
    only, so states of other kinds are lost between tokens. config: the run's flags. layered: the weights are split over
    ranks and gathered layer by layer, which needs the model's own forward.
    """
    probe = Probe(policy.lm, what)
    settings = policy.decoder.config
    supported = {
        "triton": can_run_triton(policy.decoder), "llama_step": can_run_llama_step(settings),
        "grouped": can_group(settings), "transformers": True,
    }  # fmt: skip
    if layered:
        supported = {"grouped": supported["grouped"], "transformers": True}
    for way in filter(supported.get, DECODING):
        policy.decoding = way
        failure = probe.deviation(lambda: _distance(policy, probe, config))
        if failure is None:
            return
        if way != DECODING[-1]:
            say(f"{what}: {way} decoding is not used: it fails with {probe.kind} ({failure})")
    problem = f"{probe.kind} cannot be decoded with a cache of keys and values ({failure})"
    raise UserError(f"{what}: {problem}: SFT works with it, PPO does not; give another model")


def _distance(policy: nn.Module, probe: Probe, config) -> float:
    """Returns the distance of the logits that tokens are sampled from to those of the model's own forward."""
    flags = copy.copy(config)
    flags.rollout_batch_size, flags.rollout_cache_tokens, flags.micro_batch_tokens = len(PROMPTS), 0, 1024
    flags.maxlen_res = STEPS
    ids = torch.cat(probe.rows).tolist()
    prompts = [ids[-length:] for length in PROMPTS]
    batch = PromptBatch(prompts, [[] for _ in prompts], list(range(len(prompts))))
    no_end = SimpleNamespace(eos_token_id=-1, pad_token_id=0)
    seen: list[torch.Tensor] = []  # [prompts, vocabulary] of each forward; prompts longest first, none ends early

    def watch(logits: torch.Tensor) -> None:
        seen.append(logits.clone())

    try:
        rollout = PolicySampler(InferenceEngine(policy), no_end, flags, watch=watch)(batch, Sampling(), seed=0)
    except FAILURES:
        raise
    except Exception as error:  # of Triton, for example without a C compiler
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    rows = [row[real] for row, real in zip(rollout.sequences, rollout.attention_mask, strict=True)]
    true = [probe.alone(row)[length - 1 : -1] for row, length in zip(rows, PROMPTS, strict=True)]
    return distance(torch.stack(seen[:STEPS], 1), true)
